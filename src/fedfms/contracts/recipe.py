"""What is learnt: the same at every site; `recipe.json` in a job."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedfms.bounded import number
from fedfms.contracts.decode import (
    from_dict,
    parse_json,
    parse_override,
    read_json,
    require,
    require_key,
    require_name,
)
from fedfms.errors import ConfigError, Undecodable

Backbone = Literal["vit_demo", "vit_t", "vit_b", "vit_l", "vit_h", "none"]
NO_BACKBONE = "none"  # of a method that has a network of its own and needs no checkpoint

_LEAST_OF_COSINE = 0.01  # of learning_rate; reached in the last 6 % of all steps


@dataclass(frozen=True, slots=True)
class BackboneFile:
    """A SAM backbone: its sizes that recipes need, and the checkpoint that is meant by its name."""

    patch_size: int  # pixels a side of one encoder token
    depth: int  # encoder blocks
    file_name: str
    sha256: str
    source: str  # where people get it
    licence: str  # whose it is, and under which terms it is passed on


def _of_meta(depth: int, file_name: str, sha256: str) -> BackboneFile:
    return BackboneFile(
        16,
        depth,
        file_name,
        sha256,
        f"https://dl.fbaipublicfiles.com/segment_anything/{file_name} (linked in "
        "segment-anything's README)",
        "of Segment Anything, Copyright (c) Meta Platforms, Inc. and affiliates (Apache License "
        "2.0)",
    )


BACKBONES: dict[str, BackboneFile] = {
    # shipped with the package (fedfms/models/vit_demo.safetensors); tools/train_demo_backbone.py
    "vit_demo": BackboneFile(
        8,
        4,
        "vit_demo.safetensors",
        "eb24a2e61749714e43c8b8c2a2bef9ab5b9873d04ff69ff9c737165194d41ea0",
        "the package itself: install fedfms again",
        "of FedFMS Kit (Apache License 2.0)",
    ),
    # MobileSAM's own file, weights/mobile_sam.pt of ChaoningZhang/MobileSAM
    "vit_t": BackboneFile(
        16,
        10,
        "mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        "weights/mobile_sam.pt of https://github.com/ChaoningZhang/MobileSAM",
        "of MobileSAM, whose weights derive from TinyViT and Segment Anything (Apache License 2.0)",
    ),
    # Meta's own files, as linked from the README of facebookresearch/segment-anything
    "vit_b": _of_meta(
        12,
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": _of_meta(
        24,
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": _of_meta(
        32,
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}

_LEAST_RATE = 1e-4  # of patients: with a smaller one the steps of a round are beyond counting
_MOST_DRAWS = 100
JOB_RECIPE = Path("app/config/recipe.json")  # in a job folder
# fields that came after recipes were hashed, with their defaults
_LATER: dict[str, Any] = {
    "strategy": "mean",
    "canary": False,
    "patient_rate": None,
    "patient_clip_norm": None,
    "patient_noise": 0.0,
    "guard": "scale",
    "confirmed_weights": [],
    "secure_sum": False,
    "secure_sum_bits": 64,
    "lora_rank": 8,
    "adapter_blocks": "all",
    "mask_token": 0,
    "augment": False,
    "augment_flips": "none",
    "augment_rotation": 0.0,
    "augment_scale": 1.0,
    "augment_elastic": 0.0,
    "augment_inversion": 0.1,
    "augment_gamma": 1.5,
    "augment_contrast": 0.0,
    "augment_bias": 0.0,
    "augment_blur": 0.0,
    "augment_noise": 0.0,
    "augment_probability": 0.5,
    "augment_variants": 4,
    "contrasts": [],
    "proximal_weight": 0.0,
    "personal": "none",
    "personal_after": 0,
    "site_learning_rates": [],
    "weigh_by": "slices",
    "server_learning_rate": None,
    "server_momentum": 0.9,
    "server_second_momentum": 0.99,
    "server_epsilon": 1e-3,
    "patience": 0,
    "best_by": "mean",
    "tile": None,
}
# strategies that ask for the mean of a round alone, which a secure sum gives
OF_A_MEAN = ("mean", "server_momentum", "server_adam")
MASK_TOKENS = 4  # of SAM's decoder
MOST_CONTRASTS = 16  # of a case
_MOST_CLASSES = 256
_MOST_RANK = 64  # of a low-rank update; beyond, it is none
# of an augmentation: no change, and the most with which a picture still is one
AUGMENTATIONS: dict[str, tuple[float, float]] = {
    "augment_rotation": (0.0, 180.0),
    "augment_scale": (1.0, 2.0),
    "augment_elastic": (0.0, 0.05),
    "augment_inversion": (0.0, 1.0),
    "augment_gamma": (1.0, 4.0),
    "augment_contrast": (0.0, 1.0),
    "augment_bias": (0.0, 1.0),
    "augment_blur": (0.0, 0.02),
    "augment_noise": (0.0, 0.3),
}
_MOST_VARIANTS = 1000
_LEAST_TILE, _MOST_TILE = 32, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the federation learns. The same at every site; `recipe.json` in a job."""

    method: str  # what learns and travels; which there are, fedfms.models.methods knows
    backbone: Backbone
    backbone_sha256: str  # of the SAM checkpoint; every party proves that it holds this one
    classes: tuple[str, ...]  # in the order of the output channels
    rounds: int
    exclusive_classes: bool = False  # a pixel has the likeliest class only; False: may have several
    image_size: int = 1024  # pixels, square; SAM's own input size
    resize: Literal["pad", "stretch"] = "pad"  # pad: longest side, as SAM; stretch: as FedFMS
    normalize: bool = True  # SAM's pixel mean and standard deviation; False: [0, 1], as FedFMS
    local_epochs: int = 1  # passes over a site's training slices in one round
    batch_size: int = 4  # slices per optimizer step, whatever the site's micro-batch
    learning_rate: float = 1e-4  # Adam
    schedule: Literal["constant", "cosine"] = "constant"  # over all rounds
    warmup_steps: int = 0  # optimizer steps of linear warm-up in the first round
    clip_grad_norm: float | None = None  # largest L2 norm of the gradient of one step
    loss: Literal["bce", "dice_bce"] = "bce"
    positive_weight: float = 2.0  # of foreground pixels in BCE
    # of arithmetic: tf32 rounds the factors of products on a GPU, bf16 all of the encoder but its
    # neck; what learns is fp32 in each
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    optimizer_state: Literal["keep", "reset"] = "reset"  # Adam's moments between rounds
    # on the wire, both ways; averaging is always fp32. int8: a row of a tensor has a scale
    # (exchange/coding.py), and what rounding takes from a difference a site adds to its next one
    transfer_precision: Literal["fp32", "fp16", "int8"] = "fp32"
    holdout: tuple[str, ...] = ()  # sites that evaluate and never train
    max_update_norm: float | None = None  # the server refuses a difference with a larger L2 norm
    probability_threshold: float = 0.5  # from which a pixel is foreground
    evaluate_every: int = 1  # rounds; before training, then every so many; the final model always
    evaluate_first: int = 0  # rounds of training before the first evaluation
    seed: int = 0
    require_gpu: bool = False  # a site without CUDA refuses, rather than take days on a processor
    # what the checkpoint does not hold starts as the mean of so many draws, with these weights;
    # none: a single draw
    start_draws: tuple[float, ...] = ()
    # paper_compat: the last training site in this order gets the rest of the rounded weights; sites
    # that are not listed come after the others, by name
    site_order: tuple[str, ...] = ()
    paper_compat: bool = False  # FedFMS's own behaviour; docs/protocol.md lists what changes
    strategy: str = "mean"  # of averaging; which there are, fedfms.exchange.strategies knows
    # what the guard of a round does with a difference that stands out: scale it down, or record it;
    # under paper_compat it only records
    guard: Literal["scale", "record"] = "scale"
    # training sites that may weigh more than 3 times the median, since somebody asked how many
    # slices they have
    confirmed_weights: tuple[str, ...] = ()
    # one round on two cases a site, of which zeros leave; fedfms submit --canary sets it
    canary: bool = False
    # the server sees the sum of a round's differences and no single one (exchange/secure_sum.py);
    # of at least three training sites, which know the keys of each other's trainers
    secure_sum: bool = False
    # of each value of such a sum on the wire; 32: a value times its slices is rounded to 1 / 2^17
    secure_sum_bits: int = 64
    lora_rank: int = 8  # of the updates of queries and values (models/lora.py); of no other method
    # differential privacy of patients (training/private.py): each patient is in a step with this
    # probability, drawn anew for each; a pass has 1 / patient_rate steps. null: batches of slices
    patient_rate: float | None = None
    # largest L2 norm of what one patient adds to a step: the summed gradient of all its slices
    patient_clip_norm: float | None = None
    # standard deviation of the noise on each value of a step's sum, as a share of that norm
    patient_noise: float = 0.0
    # encoder blocks that get adapters: all, or last:2 for the last two; what lies before them is
    # frozen, computed once a slice and kept on the site's disk. last:0: the mask decoder alone
    adapter_blocks: str = "all"
    # of SAM's four masks (0, and the three of an ambiguous prompt) the one that a single class
    # starts from; which suits, the scores before training tell (docs/coordinator.md)
    mask_token: int = 0
    # training slices vary (training/augment.py), drawn anew for each time that one is trained on
    augment: bool = False
    # masks follow: mirrored about the vertical axis (horizontal), the other one, or either; none
    # where a class means a side
    augment_flips: Literal["none", "horizontal", "vertical", "both"] = "none"
    augment_rotation: float = 0.0  # degrees at most, either way
    augment_scale: float = 1.0  # larger or smaller by this factor at most
    augment_elastic: float = 0.0  # largest displacement, as a share of the longer side
    # the pictures alone
    augment_inversion: float = 0.1  # probability that bright becomes dark
    augment_gamma: float = 1.5  # largest exponent of grey levels in [0, 1]; 1 / it the smallest
    augment_contrast: float = 0.0  # most of a random mapping of grey levels; 1: no more
    augment_bias: float = 0.0  # largest coefficient of a bias field's logarithm
    augment_blur: float = 0.0  # largest standard deviation, as a share of the longer side
    augment_noise: float = 0.0  # largest standard deviation, as a share of the grey range
    augment_probability: float = 0.5  # of each of these but flips (0.5) and inversion
    # where a frozen part's features are kept (adapter_blocks): so many variants of a slice, in turn
    augment_variants: int = 4
    # images of one case that a network sees together, a channel each, in this order: names of
    # `contrasts` in every site.yml. None: the one image of a case
    contrasts: tuple[str, ...] = ()
    # mu of FedProx (training/proximal.py): half of it times the squared distance of what travels
    # to the model that was received is added to the local loss; 0: federated averaging
    proximal_weight: float = 0.0
    # what learns and stays at its site (models/travelling.py): norms, layers of normalization;
    # adapters, what the method adds to the encoder
    personal: Literal["none", "norms", "adapters"] = "none"
    # rounds in which these are averaged as all else, before each site goes on with its own. A site
    # that never trained, predict and export use them as they were shared last; with 0, as the
    # network began
    personal_after: int = 0
    # learning_rate of single sites, such as site-2:3e-5
    site_learning_rates: tuple[str, ...] = ()
    # what a site counts for in the average: its training slices, its training cases, or as any
    weigh_by: Literal["slices", "cases", "equal"] = "slices"
    # of the strategies server_momentum and server_adam (exchange/strategies/adaptive.py): step on
    # the mean difference, null for 1 and 0.001; beta 1, beta 2 and tau
    server_learning_rate: float | None = None
    server_momentum: float = 0.9
    server_second_momentum: float = 0.99
    server_epsilon: float = 1e-3
    # training ends when so many evaluations in a row gave no better mean of the training sites'
    # Dice; 0: all rounds are trained
    patience: int = 0
    # which model is the best one: by the mean over training sites of their Dice, or by the lowest
    best_by: Literal["mean", "worst"] = "mean"
    # side of the square parts in which slices are trained on and predicted, in their own pixels:
    # for pictures on which what is looked for is small. null: each slice as a whole
    tile: int | None = None

    def __post_init__(self) -> None:
        require_name(self.method, "method")
        require_name(self.strategy, "strategy")
        require(
            re.fullmatch(r"[0-9a-f]{64}", self.backbone_sha256) is not None,
            f"backbone_sha256 is {self.backbone_sha256!r}",
            "write the SHA-256 of the SAM checkpoint, 64 hexadecimal digits (sha256sum FILE)",
        )
        require(bool(self.classes), "classes is empty", "name at least one class")
        require(
            len(self.classes) <= _MOST_CLASSES,
            f"classes names {len(self.classes)} classes",
            f"name at most {_MOST_CLASSES}: each has a mask of its own in the network",
        )
        for name in self.classes:
            require_name(name, "class")
        require(
            len(set(self.classes)) == len(self.classes),
            f"classes names one class twice: {', '.join(self.classes)}",
            "name each class once",
        )
        require(
            not self.exclusive_classes or len(self.classes) > 1,
            "exclusive_classes is true, and there is one class",
            "set exclusive_classes to false, or name the classes that exclude each other",
        )
        for key in ("rounds", "local_epochs", "batch_size", "evaluate_every"):
            value = getattr(self, key)
            require(value >= 1, f"{key} is {value}", f"set {key} to 1 or more")
        require(
            self.image_size >= self.patch_size and self.image_size % self.patch_size == 0,
            f"image_size is {self.image_size}",
            f"use a multiple of the backbone's patch size, {self.patch_size} pixels",
        )
        require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"learning_rate is {self.learning_rate}",
            "set a positive number, such as 1e-4",
        )
        require(
            math.isfinite(self.positive_weight) and self.positive_weight > 0,
            f"positive_weight is {self.positive_weight}",
            "set a positive number, such as 2.0",
        )
        require(
            0.0 < self.probability_threshold < 1.0,
            f"probability_threshold is {self.probability_threshold}",
            "set a number between 0 and 1, such as 0.5",
        )
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}", "set 0 or more")
        self._check_mask_token()
        require(
            1 <= self.lora_rank <= _MOST_RANK,
            f"lora_rank is {self.lora_rank}",
            f"set 1 to {_MOST_RANK}",
        )
        require(self.seed >= 0, f"seed is {self.seed}", "set 0 or more")
        require(
            self.evaluate_first >= 0,
            f"evaluate_first is {self.evaluate_first}",
            "set 0 (before training) or more rounds",
        )
        require(
            len(self.start_draws) <= _MOST_DRAWS,
            f"start_draws has {len(self.start_draws)} weights",
            f"write at most {_MOST_DRAWS}: a network is made for each",
        )
        require(
            all(math.isfinite(weight) and weight > 0 for weight in self.start_draws),
            f"start_draws is {', '.join(map(str, self.start_draws))}",
            "write a positive weight for each draw, such as 1, 1, 1, or leave it out",
        )
        for name in self.site_order:
            require_name(name, "site")
        require(
            len(set(self.site_order)) == len(self.site_order),
            f"site_order names one site twice: {', '.join(self.site_order)}",
            "name each site once",
        )
        for key in ("clip_grad_norm", "max_update_norm"):
            value = getattr(self, key)
            require(
                value is None or (math.isfinite(value) and value > 0),
                f"{key} is {value}",
                "set a positive number, or null for no limit",
            )
        for name in self.holdout:
            require_name(name, "holdout site")
        for name in self.confirmed_weights:
            require_name(name, "site")
        self._check_contrasts()
        self._check_tile()
        self._check_adapters()
        self._check_augmentation()
        self._check_patients()
        self._check_sums()
        self._check_learning_across_sites()

    def _check_contrasts(self) -> None:
        for name in self.contrasts:
            require_name(name, "contrast")
        require(
            len(set(self.contrasts)) == len(self.contrasts) <= MOST_CONTRASTS,
            f"contrasts names {len(self.contrasts)}: {', '.join(self.contrasts)}",
            f"name each once, at most {MOST_CONTRASTS}",
        )
        require(
            not self.contrasts or (self.backbone != NO_BACKBONE and not self.paper_compat),
            "contrasts are named, and the network sees three channels (backbone none, or "
            "paper_compat)",
            "leave contrasts out",
        )

    def _check_tile(self) -> None:
        require(
            self.tile is None or _LEAST_TILE <= self.tile <= _MOST_TILE,
            f"tile is {self.tile}",
            f"set {_LEAST_TILE} to {_MOST_TILE} pixels, or null for slices as a whole",
        )
        require(
            self.tile is None or (self.resize == "pad" and not self.paper_compat),
            "tile is set, and slices are stretched (resize: stretch, or paper_compat)",
            "leave tile out: FedFMS trains on whole slices",
        )

    def _check_adapters(self) -> None:
        if self.adapter_blocks == "all":
            return
        require(
            self.backbone != NO_BACKBONE,
            f"adapter_blocks is {self.adapter_blocks}, and there is no backbone",
            "leave adapter_blocks out",
        )
        require(
            not self.paper_compat,
            f"adapter_blocks is {self.adapter_blocks}, and paper_compat is true",
            "leave adapter_blocks out: FedFMS has adapters in all blocks",
        )
        found = re.fullmatch(r"last:(0|[1-9][0-9]{0,2})", self.adapter_blocks)
        depth = BACKBONES[self.backbone].depth
        require(
            found is not None and int(found[1]) <= depth,
            f"adapter_blocks is {self.adapter_blocks!r}",
            f"write all, or last:K with K from 0 to {depth}, the blocks of {self.backbone}",
        )

    def _check_mask_token(self) -> None:
        require(
            0 <= self.mask_token < MASK_TOKENS,
            f"mask_token is {self.mask_token}",
            f"set 0 to {MASK_TOKENS - 1}",
        )
        for problem, there in (
            (
                f"there are {len(self.classes)} classes, which mix all of them",
                len(self.classes) > 1,
            ),
            ("there is no backbone", self.backbone == NO_BACKBONE),
            ("paper_compat is true", self.paper_compat),
        ):
            require(
                self.mask_token == 0 or not there,
                f"mask_token is {self.mask_token}, and {problem}",
                "leave mask_token out",
            )

    def _check_augmentation(self) -> None:
        for key, (none, most) in AUGMENTATIONS.items():
            value = getattr(self, key)
            require(
                none <= value <= most,
                f"{key} is {value}",
                f"set {none:g} (off) to {most:g}",
            )
        require(
            0.0 <= self.augment_probability <= 1.0,
            f"augment_probability is {self.augment_probability}",
            "set a probability from 0 to 1, such as 0.5",
        )
        require(
            1 <= self.augment_variants <= _MOST_VARIANTS,
            f"augment_variants is {self.augment_variants}",
            f"set 1 to {_MOST_VARIANTS}: the features of each are kept on the site's disk",
        )
        require(
            not (self.augment and self.paper_compat),
            "paper_compat is true, and augment too",
            "set augment to false: FedFMS trains on the slices as they are",
        )

    def _check_patients(self) -> None:
        rate, norm, noise = self.patient_rate, self.patient_clip_norm, self.patient_noise
        require(
            rate is None or _LEAST_RATE <= rate <= 1,
            f"patient_rate is {rate}",
            f"set a probability from {_LEAST_RATE:g} to 1, such as 0.1, or null for batches of "
            "slices",
        )
        require(
            norm is None or (math.isfinite(norm) and norm > 0),
            f"patient_clip_norm is {norm}",
            "set a positive number, such as 1.0, or null",
        )
        require(math.isfinite(noise) and noise >= 0, f"patient_noise is {noise}", "set 0 or more")
        require(
            (rate is None) == (norm is None),
            "of patient_rate and patient_clip_norm one is set and the other is not",
            "set both, for differential privacy of patients, or neither",
        )
        require(
            rate is None or self.clip_grad_norm is None,
            "clip_grad_norm and patient_rate are both set",
            "leave clip_grad_norm out: patient_clip_norm takes its place",
        )
        require(
            noise == 0 or rate is not None,
            "patient_noise asks for noise, and there is no patient_rate",
            "set patient_rate and patient_clip_norm: the noise is a share of patient_clip_norm",
        )

    def _check_learning_across_sites(self) -> None:
        require(
            math.isfinite(self.proximal_weight) and self.proximal_weight >= 0,
            f"proximal_weight is {self.proximal_weight}",
            "set 0 for none, or a positive number such as 0.01",
        )
        for text in self.site_learning_rates:
            site, _, of_site = text.partition(":")
            require_name(site, "site")
            require(
                _rate(of_site) is not None,
                f"site_learning_rates has {text!r}",
                "write SITE:RATE with a positive rate, such as site-2:3e-5",
            )
        named = self.sites_with_a_rate
        require(
            len(set(named)) == len(named),
            f"site_learning_rates names one site twice: {', '.join(named)}",
            "name each site once",
        )
        rate = self.server_learning_rate
        require(
            rate is None or (math.isfinite(rate) and rate > 0),
            f"server_learning_rate is {rate}",
            "set a positive number, or null for the strategy's usual one",
        )
        for key in ("server_momentum", "server_second_momentum"):
            require(
                0 <= getattr(self, key) < 1,
                f"{key} is {getattr(self, key)}",
                "set a number from 0 to below 1",
            )
        require(
            math.isfinite(self.server_epsilon) and self.server_epsilon > 0,
            f"server_epsilon is {self.server_epsilon}",
            "set a positive number, such as 0.001",
        )
        require(
            self.personal_after >= 0,
            f"personal_after is {self.personal_after}",
            "set 0, or the rounds in which what is personal later is shared",
        )
        require(
            self.personal_after == 0 or self.personal != "none",
            f"personal_after is {self.personal_after}, and personal is none",
            "set personal to norms or adapters, or leave personal_after out",
        )
        require(self.patience >= 0, f"patience is {self.patience}", "set 0 for all rounds, or more")
        for key in ("proximal_weight", "personal", "site_learning_rates", "weigh_by", "patience"):
            value = getattr(self, key)
            require(
                not self.paper_compat or value in (0, "none", (), "slices"),
                f"{key} is {value}, and paper_compat is true",
                f"leave {key} out: FedFMS has no such thing",
            )

    def _check_sums(self) -> None:
        for key, usual in (("strategy", OF_A_MEAN), ("paper_compat", (False,))):
            value = getattr(self, key)
            require(
                not self.secure_sum or value in usual,
                f"secure_sum is true, and {key} is {str(value).lower()}",
                f"leave {key} out: of a sum nobody can see what it asks for",
            )
        require(
            not self.secure_sum or self.transfer_precision != "int8",
            "secure_sum is true, and transfer_precision is int8",
            "set transfer_precision to fp16 (a masked value has secure_sum_bits whatever it was), "
            "or secure_sum to false",
        )
        require(
            self.secure_sum_bits in (64, 32),
            f"secure_sum_bits is {self.secure_sum_bits}",
            "set 64, or 32 to send half as much",
        )
        require(
            self.secure_sum or self.secure_sum_bits == 64,
            "secure_sum_bits is 32, and secure_sum is false",
            "set secure_sum to true, or leave secure_sum_bits out",
        )

    def at(self, site: str) -> Recipe:
        """The recipe as this site trains by it: with its own learning rate, where it has one."""
        for text in self.site_learning_rates:
            name, _, rate = text.partition(":")
            if name == site:
                return dataclasses.replace(
                    self, learning_rate=_rate(rate) or self.learning_rate, site_learning_rates=()
                )
        return self

    @property
    def sites_with_a_rate(self) -> tuple[str, ...]:
        """Sites that `site_learning_rates` names."""
        return tuple(text.partition(":")[0] for text in self.site_learning_rates)

    @property
    def alone(self) -> Recipe:
        """The recipe where there is no federation: all that learns is trained in one place.

        Nothing is received that a proximal term could hold to, and nothing stays elsewhere.
        """
        return dataclasses.replace(
            self,
            proximal_weight=0.0,
            personal="none",
            personal_after=0,
            site_learning_rates=(),
            weigh_by="slices",
        )

    @property
    def sums_only(self) -> bool:
        """Whether the server may see sums only: of a canary it sees zeros."""
        return self.secure_sum and not self.canary

    @property
    def scored_precision(self) -> Literal["fp32", "fp16"]:
        """In which a finished model travels to be scored; once, so never in eight bits."""
        return "fp16" if self.transfer_precision == "int8" else self.transfer_precision

    @property
    def steps_of_patients(self) -> int:
        """Steps of a round that samples patients: as many as give each `local_epochs` turns.

        The same at every site, whatever it has; 0 where slices make the batches.
        """
        if self.patient_rate is None:
            return 0
        return max(1, round(self.local_epochs / self.patient_rate))

    def falls_to(self, share: float) -> float:
        """What of `learning_rate` the schedule leaves after this share of all rounds, [0.01, 1].

        Half a cosine does not fall to nothing: a policy's `min_learning_rate` holds in each round.
        """
        if self.schedule == "constant":
            return 1.0
        return max(_LEAST_OF_COSINE, 0.5 * (1.0 + math.cos(math.pi * share)))

    @property
    def frozen_blocks(self) -> int | None:
        """Encoder blocks before the first one with an adapter; None with adapters in all.

        All of them where none has one: then the whole encoder is frozen.
        """
        if self.adapter_blocks == "all":
            return None
        depth = BACKBONES[self.backbone].depth
        return depth - int(self.adapter_blocks.removeprefix("last:"))

    @property
    def patch_size(self) -> int:
        """Side of one encoder token in pixels; 4 where there is none, for masks of image_size."""
        return BACKBONES[self.backbone].patch_size if self.backbone != NO_BACKBONE else 4

    @property
    def mask_size(self) -> int:
        """Side of the decoder's output in pixels: four per encoder token (256 at 1024 pixels)."""
        return self.image_size // self.patch_size * 4

    @property
    def rounds_to_run(self) -> int:
        """Rounds that a job of this recipe has: of a canary one, whatever it goes before has."""
        return 1 if self.canary else self.rounds

    def evaluates(self, rounds_trained: int) -> bool:
        """Whether the model is scored after so many rounds of training, before it goes on.

        In a federation that is the model that they receive in the round of this number, counted
        from 0. The final model is scored after the last round whatever this says. A canary scores.
        """
        if self.canary:
            return True
        since = rounds_trained - self.evaluate_first
        return since >= 0 and since % self.evaluate_every == 0

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "recipe.json") -> Recipe:
        """Build from JSON types; `source` says in an error where they stood."""
        return from_dict(cls, values, source)

    @classmethod
    def from_json(cls, path: Path) -> Recipe:
        """Read a `recipe.json`."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_text(cls, text: str, source: str) -> Recipe:
        """Read the text of a `recipe.json`; `source` says in an error where it stood."""
        return cls.from_dict(parse_json(text, source), source)

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, as JSON types."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def to_json(self) -> str:
        """The text of a `recipe.json` with all values."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @property
    def sha256(self) -> str:
        """SHA-256 over all values in canonical JSON: equal exactly where the recipes are equal.

        Fields of `_LATER` enter it only where they say something else than before they existed.
        """
        values = {key: v for key, v in self.to_dict().items() if v != _LATER.get(key, ...)}
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_overrides(self, overrides: typing.Sequence[str]) -> Recipe:
        """The recipe with `key=value` texts applied, as `--set rounds=20 --set classes=disc,cup`.

        See `with_values` for the backbone.
        """
        hints = typing.get_type_hints(Recipe)
        values: dict[str, Any] = {}
        for text in overrides:
            key, sign, value = text.partition("=")
            require(bool(sign), f"--set {text} has no '='", "write --set NAME=VALUE")
            require_key(key, hints, "--set")
            values[key] = parse_override(key, value, hints[key])
        return self.with_values(values, "--set")

    def with_values(self, values: typing.Mapping[str, Any], source: str) -> Recipe:
        """The recipe with other values, as JSON types; `source` says in an error where they stood.

        Another backbone without its own `backbone_sha256` means the official checkpoint.
        """
        official = BACKBONES.get(str(values.get("backbone")))
        implied = {} if official is None else {"backbone_sha256": official.sha256}
        if values.get("backbone") == NO_BACKBONE:
            implied = {"backbone_sha256": "0" * 64}
        return Recipe.from_dict({**self.to_dict(), **implied, **values}, source)


def _rate(text: str) -> float | None:
    """A learning rate as it is written; None where it is none."""
    try:
        rate = number(text, "the learning rate")
    except Undecodable:
        return None
    return rate if math.isfinite(rate) and rate > 0 else None


def adapters_in_words(adapter_blocks: str) -> str:
    """What `adapter_blocks` changes, for people; nothing where all blocks have adapters."""
    if not adapter_blocks.startswith("last:"):  # a record of before has none
        return ""
    count = adapter_blocks.removeprefix("last:")
    if count == "0":
        return "here without adapters: the mask decoder alone"
    return f"here with adapters in the last {'block' if count == '1' else f'{count} blocks'} alone"


def read_job_recipe(
    job: Path,
    instead: Path | None = None,
    overrides: typing.Sequence[str] = (),
    *,
    any_method: bool = False,
) -> Recipe:
    """The recipe of a job folder with `key=value` overrides.

    Args:
        job: job folder, such as jobs/fedmsa.
        instead: a recipe in the place of the job's own; the overrides are applied to it.
        overrides: see `Recipe.with_overrides`.
        any_method: whether the recipe may be of another method than the job's own, as for a job
            that only evaluates.

    Raises:
        ConfigError: a recipe or an override that cannot be used; code other-method.
    """
    own = Recipe.from_json(job / JOB_RECIPE)
    recipe = own if instead is None else Recipe.from_json(instead)
    recipe = recipe.with_overrides(overrides)
    if recipe.method != own.method and not any_method:
        where = f"{instead} is" if instead is not None else "--set asks for"
        raise ConfigError(
            f"{where} a recipe of {recipe.method}, and {job} is a job of {own.method}",
            f"name jobs/{recipe.method}, or a recipe of {own.method}",
            code="other-method",
        )
    return recipe
