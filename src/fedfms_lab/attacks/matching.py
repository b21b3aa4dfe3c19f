"""Pictures out of differences that have no patch embedding: gradient matching within a prior.

What FedMSA lets travel, adapters and the mask decoder, has gradients that are sums over all tokens:
no linear algebra takes them apart. Who knows network, loss and weights can look for the picture,
and its outline, whose gradient points where the difference points (Zhu et al. 2019, arXiv
1906.08935; its cosine, Geiping et al. 2020, arXiv 2003.14053). Pixel by pixel that finds little; it
finds more among mixtures of what public pictures of the same kind look like (a linear prior in the
place of the generator of Jeon et al. 2021, arXiv 2110.14962).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedfms.contracts.recipe import Recipe
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.segmenter import Segmenter
from fedfms.models.travelling import read_travelling, travelling_names, write_travelling
from fedfms.training.losses import loss_per_class
from fedfms_lab.attacks.sites import AttackedSite

PUBLIC = 100  # patients of the same kind whose pictures and outlines the coordinator has
COMPONENTS = 80  # of them; nine tenths of what is in the phantoms' slices
STEPS = 100  # of Adam for each picture
_RATE = 0.1
_OUTLINE = 3.0  # what a pixel of an outline counts beside one of the picture, of spread 1
_STIRRED = 0.05


class Prior:
    """Pictures with their outlines as mixtures of principal components.

    Args:
        pictures: (N, 3, S, S), as the network sees them.
        outlines: (N, K, M, M), 0 or 1.
        components: how many; fewer where there are fewer pictures.
    """

    def __init__(self, pictures: Tensor, outlines: Tensor, components: int = COMPONENTS) -> None:
        self._shapes = pictures.shape[1:], outlines.shape[1:]
        self._spread = float(pictures.std())
        flat = pictures.flatten(1) / self._spread, _OUTLINE * outlines.flatten(1)
        self._split = flat[0].shape[1]
        joined = torch.cat(flat, dim=1)
        self._mean = joined.mean(dim=0)
        _, sizes, axes = torch.linalg.svd(joined - self._mean, full_matrices=False)
        sizes, axes = sizes[:components], axes[:components]
        self._axes = axes * (sizes / len(joined) ** 0.5)[:, None]

    @property
    def components(self) -> int:
        """How many numbers are a picture."""
        return len(self._axes)

    def decoded(self, mixture: Tensor) -> tuple[Tensor, Tensor]:
        """(components,), of spread 1, to the picture (3, S, S) and its outline (K, M, M)."""
        joined = self._mean + mixture @ self._axes
        picture = joined[: self._split] * self._spread
        outline = (joined[self._split :] / _OUTLINE).clamp(0.0, 1.0)
        return picture.reshape(self._shapes[0]), outline.reshape(self._shapes[1])


class Matcher:
    """A coordinator who looks for slices of phantoms of one kind.

    Args:
        recipe: of any method whose loss has a gradient in the picture.
        folder: for the public phantoms.
        checkpoints: folder of SAM checkpoints; none is needed for vit_demo.
    """

    def __init__(self, recipe: Recipe, folder: Path, checkpoints: Path | None = None) -> None:
        public = AttackedSite(folder, cases=PUBLIC, slices=2, seed=10_000, policy={})
        self._recipe = recipe
        self.prior = Prior(*public.slices(recipe))
        self._model: Segmenter = build_model(recipe, find_checkpoint(recipe, checkpoints)).train()
        self._names = travelling_names(self._model)

    def first_model(self) -> dict[str, Tensor]:
        """Weights under which every travelling tensor has a gradient.

        The second layers of adapters start as zeros, and their first layers have none then.
        """
        generator = torch.Generator().manual_seed(self._recipe.seed)
        return {
            name: tensor
            if bool(tensor.any())
            else _STIRRED * torch.randn(tensor.shape, generator=generator)
            for name, tensor in read_travelling(self._model).items()
        }

    def found(
        self, differences: Sequence[Mapping[str, Tensor]], models: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What each difference shows, by the model that it was made from.

        Returns:
            pictures, grey, (P, S, S), and outlines of the first class, (P, M, M).
        """
        found = [self._match(*pair) for pair in zip(differences, models, strict=True)]
        pictures = torch.stack([picture.mean(dim=0) for picture, _ in found])
        return pictures, torch.stack([outline[0] for _, outline in found])

    def _match(
        self, difference: Mapping[str, Tensor], model: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        write_travelling(self._model, model)
        parameters = dict(self._model.named_parameters())
        learned = [parameters[name] for name in self._names]
        wanted = -torch.cat([difference[name].flatten() for name in self._names]).float()
        mixture = torch.zeros(self.prior.components, requires_grad=True)
        adam = torch.optim.Adam([mixture], lr=_RATE)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
        for _ in range(STEPS):
            picture, outline = self.prior.decoded(mixture)
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                loss = loss_per_class(self._model(picture[None]), outline[None], self._recipe)
                parts = torch.autograd.grad(
                    loss.mean(), learned, create_graph=True, materialize_grads=True
                )
                gradient = torch.cat([part.flatten() for part in parts])
                away = 1 - torch.cosine_similarity(gradient, wanted, dim=0, eps=1e-30)
                (mixture.grad,) = torch.autograd.grad(
                    away + 1e-4 * mixture.square().mean(), [mixture]
                )
            adam.step()
            falling.step()
        picture, outline = self.prior.decoded(mixture.detach())
        return picture, outline
