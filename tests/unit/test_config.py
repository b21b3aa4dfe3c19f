import dataclasses
import hashlib
import json
import os
import random
import typing
from dataclasses import fields
from pathlib import Path

import pytest

from fedfms.contracts.decode import OPTIONS, changed, read_yaml
from fedfms.contracts.machine import Machine
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import BACKBONES, JOB_RECIPE, Recipe, read_job_recipe
from fedfms.contracts.site import (
    Compute,
    Folder,
    Intensity,
    Labels,
    Reading,
    Setup,
    SiteConfig,
)
from fedfms.errors import ConfigError

MINIMAL = {
    "method": "fedmsa",
    "backbone": "vit_b",
    "backbone_sha256": BACKBONES["vit_b"].sha256,
    "classes": ["nucleus"],
    "rounds": 3,
}

SITE = """
data_root: images-of-the-hospital
format: nifti
images: images/*.nii.gz
labels: labels/*.nii.gz
classes:
  hippocampus: [1, 2]
"""


def recipe(**changes):
    return Recipe.from_dict({**MINIMAL, **changes})


def write_site(folder, text=SITE, **changes):
    path = folder / "site.yml"
    path.write_text(text + "".join(f"{key}: {value}\n" for key, value in changes.items()))
    return path


def site(folder, **changes):
    return SiteConfig.from_yaml(write_site(folder, **changes))


def refusal(call, *args, **kwargs):
    """The error of a call, checked to tell what to do."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert caught.value.problem and caught.value.fix
    return caught.value


# ---------------------------------------------------------------------------------------- recipe


def random_recipe(generator: random.Random) -> Recipe:
    pick = generator.choice
    backbone = pick(list(BACKBONES))
    patch = BACKBONES[backbone].patch_size
    names = ["optic_disc", "optic-cup", "nucleus", "T2", "9mm"]
    return Recipe(
        method=pick(["fedsam", "fedmsa"]),
        backbone=backbone,
        backbone_sha256=f"{generator.getrandbits(256):064x}",
        classes=tuple(generator.sample(names, generator.randint(1, 5))),
        rounds=generator.randint(1, 500),
        image_size=patch * generator.randint(1, 80),
        resize=pick(["pad", "stretch"]),
        normalize=pick([True, False]),
        local_epochs=generator.randint(1, 9),
        batch_size=generator.randint(1, 64),
        learning_rate=pick([1e-4, 3e-05, 0.1, generator.uniform(1e-9, 1)]),
        schedule=pick(["constant", "cosine"]),
        warmup_steps=generator.randint(0, 1000),
        clip_grad_norm=pick([None, 1.0, generator.uniform(1e-3, 9)]),
        loss=pick(["bce", "dice_bce"]),
        positive_weight=generator.uniform(0.1, 9),
        precision=pick(["fp32", "tf32", "bf16"]),
        optimizer_state=pick(["keep", "reset"]),
        transfer_precision=pick(["fp32", "fp16", "int8"]),
        holdout=tuple(generator.sample(["site-1", "site-2", "site-3"], generator.randint(0, 3))),
        max_update_norm=pick([None, generator.uniform(1e-3, 99)]),
        probability_threshold=generator.uniform(0.01, 0.99),
        evaluate_every=generator.randint(1, 30),
        evaluate_first=generator.randint(0, 3),
        start_draws=pick([(), (1.0, 1.0), (generator.uniform(0.1, 9), 2.0, 0.5)]),
        site_order=pick([(), ("site-3", "site-1")]),
        seed=generator.getrandbits(31),
        paper_compat=pick([True, False]),
    )


@pytest.mark.parametrize("seed", range(50))
def test_a_recipe_survives_dict_json_and_file(seed, tmp_path):
    made = random_recipe(random.Random(seed))
    assert Recipe.from_dict(made.to_dict()) == made
    path = tmp_path / "recipe.json"
    path.write_text(made.to_json())
    read = Recipe.from_json(path)
    assert read == made and read.sha256 == made.sha256


@pytest.mark.parametrize("seed", range(50))
def test_a_recipe_survives_being_typed_as_overrides(seed):
    made = random_recipe(random.Random(1000 + seed))

    def typed(value):
        if isinstance(value, list):
            return ",".join(map(str, value))
        return value if isinstance(value, str) else json.dumps(value)

    overrides = [f"{key}={typed(value)}" for key, value in made.to_dict().items()]
    assert recipe().with_overrides(overrides) == made


def test_to_dict_holds_every_field_with_its_default():
    values = recipe().to_dict()
    assert list(values) == [f.name for f in dataclasses.fields(Recipe)]
    assert values["learning_rate"] == 1e-4 and values["image_size"] == 1024


def test_the_hash_is_the_same_whatever_the_order_and_spelling():
    backwards = dict(reversed(MINIMAL.items()))
    assert Recipe.from_dict(backwards).sha256 == recipe().sha256
    assert recipe(learning_rate="1e-4").sha256 == recipe(learning_rate=0.0001).sha256
    assert recipe(image_size=1024, seed=0).sha256 == recipe().sha256
    assert recipe(positive_weight=2).sha256 == recipe(positive_weight=2.0).sha256


def test_the_hash_differs_as_soon_as_one_value_does():
    base = recipe(classes=["cell", "nucleus"])
    others = {
        "method": "fedsam",
        "backbone": "vit_l",
        "backbone_sha256": "1" * 64,
        "classes": ["nucleus", "cell"],
        "exclusive_classes": True,
        "rounds": 4,
        "image_size": 512,
        "resize": "stretch",
        "normalize": False,
        "local_epochs": 2,
        "batch_size": 2,
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup_steps": 1,
        "clip_grad_norm": 1.0,
        "loss": "dice_bce",
        "positive_weight": 1.0,
        "precision": "bf16",
        "optimizer_state": "keep",
        "transfer_precision": "fp16",
        "holdout": ["site-4"],
        "max_update_norm": 5.0,
        "probability_threshold": 0.4,
        "evaluate_every": 5,
        "evaluate_first": 1,
        "start_draws": [1.0, 2.0],
        "site_order": ["site-2", "site-1"],
        "seed": 1,
        "require_gpu": True,
        "paper_compat": True,
        "strategy": "fedavgm",
        "canary": True,
        "guard": "record",
        "confirmed_weights": ["site-2"],
        "secure_sum": True,
        "secure_sum_bits": 32,
        "patient_rate": 0.1,
        "patient_clip_norm": 1.0,
        "patient_noise": 0.5,
        "adapter_blocks": "last:2",
        "lora_rank": 4,
        "mask_token": 2,
        "augment": True,
        "augment_flips": "both",
        "augment_rotation": 30.0,
        "augment_scale": 1.3,
        "augment_elastic": 0.02,
        "augment_inversion": 0.5,
        "augment_gamma": 2.0,
        "augment_contrast": 0.4,
        "augment_bias": 0.1,
        "augment_blur": 0.01,
        "augment_noise": 0.1,
        "augment_probability": 0.2,
        "augment_variants": 8,
        "contrasts": ["t1", "flair"],
        "proximal_weight": 0.1,
        "personal": "norms",
        "personal_after": 2,
        "site_learning_rates": ["site-2:3e-5"],
        "weigh_by": "equal",
        "server_learning_rate": 0.5,
        "server_momentum": 0.5,
        "server_second_momentum": 0.9,
        "server_epsilon": 0.01,
        "patience": 3,
        "best_by": "worst",
        "tile": 512,
    }
    assert set(others) == {f.name for f in dataclasses.fields(Recipe)}
    of_patients = {
        "patient_rate": 0.2,
        "patient_clip_norm": 2.0,
    }  # one is nothing without the other
    together = {key: of_patients for key in others if key.startswith("patient")}
    together["personal_after"] = {"personal": "adapters"}
    together["secure_sum_bits"] = {"secure_sum": True}
    together["mask_token"] = {"classes": ["cell"]}
    hashes = {
        base.with_values({**together.get(key, {}), key: value}, "test").sha256
        for key, value in others.items()
    }
    assert len(hashes | {base.sha256}) == len(others) + 1


def test_a_recipe_that_says_nothing_of_what_came_later_has_the_hash_it_always_had():
    later = {"strategy", "canary", "guard", "confirmed_weights", "secure_sum", "secure_sum_bits"}
    later |= {"proximal_weight", "personal", "site_learning_rates", "weigh_by", "patience"}
    later |= {"server_learning_rate", "server_momentum", "server_second_momentum"}
    later |= {"server_epsilon", "best_by", "personal_after"}
    later |= {"patient_rate", "patient_clip_norm", "patient_noise", "adapter_blocks", "lora_rank"}
    later |= {key for key in recipe().to_dict() if key.startswith("augment")}
    later |= {"contrasts", "mask_token", "tile"}
    before = {key: value for key, value in recipe().to_dict().items() if key not in later}
    canonical = json.dumps(before, sort_keys=True, separators=(",", ":")).encode()
    assert (
        recipe().sha256 == recipe(strategy="mean").sha256 == hashlib.sha256(canonical).hexdigest()
    )


def test_a_site_trains_by_its_own_rate_and_what_is_pooled_by_no_part_of_a_federation():
    made = recipe(
        site_learning_rates=["site-2:3e-5"], personal="norms", proximal_weight=0.1, learning_rate=1
    )
    assert (made.at("site-2").learning_rate, made.at("site-1").learning_rate) == (3e-5, 1)
    assert made.at("site-1") == made
    assert made.alone == recipe(learning_rate=1)
    assert recipe(strategy="server_adam", secure_sum=True).sums_only


def test_a_method_of_another_package_is_a_name_that_recipe_and_policy_carry():
    assert recipe(method="decoder").method == "decoder"
    assert Policy(methods=("fedmsa", "decoder")).methods == ("fedmsa", "decoder")
    with pytest.raises(ConfigError, match="method name 'a b' cannot be used"):
        recipe(method="a b")
    with pytest.raises(ConfigError, match=r"method name '\.\./x' cannot be used"):
        Policy(methods=("../x",))


def test_a_network_without_a_backbone_file_has_masks_of_its_pictures_size():
    own = recipe().with_values({"backbone": "none", "image_size": 36}, "test")
    assert (own.backbone_sha256, own.mask_size) == ("0" * 64, 36)


def test_every_nth_model_is_scored_from_before_training_on():
    due = [
        number for number in range(101) if recipe(rounds=100, evaluate_every=5).evaluates(number)
    ]
    assert due == [
        0,
        5,
        10,
        15,
        20,
        25,
        30,
        35,
        40,
        45,
        50,
        55,
        60,
        65,
        70,
        75,
        80,
        85,
        90,
        95,
        100,
    ]
    assert all(recipe().evaluates(number) for number in range(4))
    first = recipe(rounds=100, evaluate_every=5, evaluate_first=1)
    assert [n for n in range(100) if first.evaluates(n)] == list(range(1, 100, 5))
    assert "evaluate_first is -1" in refusal(recipe, evaluate_first=-1).problem
    assert "evaluate_every is 0" in refusal(recipe, evaluate_every=0).problem


def test_a_recipe_may_stand_in_for_that_of_a_job_of_the_same_method(tmp_path):
    (tmp_path / "job" / JOB_RECIPE).parent.mkdir(parents=True)
    (tmp_path / "job" / JOB_RECIPE).write_text(json.dumps(MINIMAL))
    for method in ("fedmsa", "fedsam"):
        other = recipe(method=method, rounds=9)
        (tmp_path / f"{method}.json").write_text(other.to_json())
    job, given = tmp_path / "job", tmp_path / "fedmsa.json"
    assert read_job_recipe(job) == recipe()
    assert read_job_recipe(job, given, ["seed=4"]) == recipe(rounds=9, seed=4)
    error = refusal(read_job_recipe, job, tmp_path / "fedsam.json")
    assert error.code == "other-method" and "fedsam.json is a recipe of fedsam" in error.problem
    assert "name jobs/fedsam" in error.fix
    assert refusal(read_job_recipe, job, None, ["method=fedsam"]).code == "other-method"
    evaluated = read_job_recipe(job, tmp_path / "fedsam.json", any_method=True)
    assert evaluated.method == "fedsam"


def test_the_order_of_classes_counts():
    assert recipe(classes=["a", "b"]).sha256 != recipe(classes=["b", "a"]).sha256


@pytest.mark.parametrize(
    ("values", "problem", "fix"),
    [
        ({"learing_rate": 1e-3}, "learing_rate", "did you mean learning_rate?"),
        ({"batchsize": 2}, "batchsize", "did you mean batch_size?"),
        ({"qqqq": 1}, "qqqq", "known keys: adapter_blocks, augment, augment_bias, "),
        ({"rounds": 0}, "rounds is 0", "1 or more"),
        ({"rounds": 2.5}, "rounds is 2.5", "a whole number"),
        ({"rounds": True}, "rounds is True", "a whole number"),
        ({"rounds": "3"}, "rounds is '3'", "a whole number"),
        ({"normalize": "no"}, "normalize is 'no'", "true or false"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'", "a number"),
        ({"learning_rate": 0}, "learning_rate is 0", "positive"),
        ({"learning_rate": float("nan")}, "learning_rate is nan", "positive"),
        ({"positive_weight": -1}, "positive_weight is -1", "positive"),
        ({"probability_threshold": 1.0}, "probability_threshold is 1.0", "between 0 and 1"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0", "null for no limit"),
        ({"max_update_norm": float("inf")}, "max_update_norm is inf", "null for no limit"),
        ({"method": "fed prox"}, "'fed prox'", "letters, digits"),
        ({"backbone": "vit_g"}, "backbone is 'vit_g'", "vit_demo, vit_t, vit_b, vit_l, vit_h"),
        ({"backbone_sha256": "abc"}, "backbone_sha256 is 'abc'", "64 hexadecimal digits"),
        ({"classes": []}, "classes is empty", "at least one class"),
        ({"classes": [f"c{n}" for n in range(257)]}, "names 257 classes", "at most 256"),
        ({"classes": "nucleus"}, "'nucleus'", "write a list"),
        ({"classes": ["a", "a"]}, "one class twice", "once"),
        ({"classes": ["../etc"]}, "'../etc'", "letters, digits"),
        ({"holdout": ["site 4"]}, "'site 4'", "letters, digits"),
        ({"image_size": 1000}, "image_size is 1000", "multiple of the backbone's patch size, 16"),
        ({"image_size": 0}, "image_size is 0", "multiple"),
        ({"seed": -1}, "seed is -1", "0 or more"),
        ({"warmup_steps": -1}, "warmup_steps is -1", "0 or more"),
        ({"contrasts": ["t1", "t1"]}, "contrasts names 2: t1, t1", "name each once"),
        ({"contrasts": ["t1"], "paper_compat": True}, "sees three channels", "leave contrasts out"),
        ({"adapter_blocks": "last"}, "adapter_blocks is 'last'", "last:K with K from 0 to 12"),
        ({"adapter_blocks": "last:13"}, "'last:13'", "the blocks of vit_b"),
        ({"adapter_blocks": "last:-1"}, "'last:-1'", "K from 0"),
        ({"adapter_blocks": "last:2", "paper_compat": True}, "paper_compat", "leave adapter_bl"),
        ({"augment_rotation": 200}, "augment_rotation is 200", "0 (off) to 180"),
        ({"augment_scale": 0.5}, "augment_scale is 0.5", "1 (off) to 2"),
        ({"augment_noise": float("nan")}, "augment_noise is nan", "0 (off) to 0.3"),
        ({"augment_probability": 1.1}, "augment_probability is 1.1", "from 0 to 1"),
        ({"augment_variants": 0}, "augment_variants is 0", "kept on the site's disk"),
        ({"augment": True, "paper_compat": True}, "and augment too", "set augment to false"),
        ({"proximal_weight": -0.1}, "proximal_weight is -0.1", "0 for none"),
        ({"personal": "head"}, "personal is 'head'", "none, norms, adapters"),
        ({"personal_after": 2}, "personal_after is 2, and personal is none", "set personal to"),
        ({"personal_after": -2, "personal": "norms"}, "personal_after is -2", "set 0"),
        ({"site_learning_rates": ["site-2"]}, "has 'site-2'", "SITE:RATE"),
        ({"site_learning_rates": ["site-2:0"]}, "has 'site-2:0'", "positive rate"),
        ({"site_learning_rates": ["a:1e-3", "a:1e-4"]}, "one site twice", "once"),
        ({"server_learning_rate": 0.0}, "server_learning_rate is 0.0", "null"),
        ({"server_momentum": 1.0}, "server_momentum is 1.0", "below 1"),
        ({"server_epsilon": 0.0}, "server_epsilon is 0.0", "positive"),
        ({"patience": -1}, "patience is -1", "0 for all rounds"),
        ({"tile": 8}, "tile is 8", "32 to 8192 pixels"),
        ({"tile": 512, "resize": "stretch"}, "tile is set", "leave tile out"),
        ({"weigh_by": "equal", "paper_compat": True}, "paper_compat is true", "leave weigh_by"),
        ({"secure_sum": True, "strategy": "median"}, "strategy is median", "leave strategy out"),
        ({"adapter_blocks": "last:2", "backbone": "none"}, "there is no backbone", "leave adapter"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_with_a_fix(values, problem, fix):
    error = refusal(recipe, **values)
    assert problem in error.problem and fix in error.fix


def test_a_recipe_without_what_it_needs_names_all_of_it():
    error = refusal(Recipe.from_dict, {"method": "fedsam"}, "jobs/fedsam/recipe.json")
    for name in ("jobs/fedsam/recipe.json", "backbone", "backbone_sha256", "classes", "rounds"):
        assert name in error.problem


def test_mask_size_is_four_pixels_a_token():
    assert (recipe().patch_size, recipe().mask_size) == (16, 256)
    demo = recipe(backbone="vit_demo", image_size=128)
    assert (demo.patch_size, demo.mask_size) == (8, 64)


def test_recipe_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "recipe.json"
    assert str(path) in refusal(Recipe.from_json, path).problem
    for content in (b'{"rounds": 3', b"[1, 2]", b"\xff\xfe\x00"):
        path.write_bytes(content)
        assert str(path) in refusal(Recipe.from_json, path).problem


# ------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rounds=20", "rounds", 20),
        ("classes=optic_disc,optic_cup", "classes", ("optic_disc", "optic_cup")),
        ("classes= optic_disc , optic_cup ", "classes", ("optic_disc", "optic_cup")),
        ("holdout=", "holdout", ()),
        ("learning_rate=1e-3", "learning_rate", 1e-3),
        ("learning_rate=1", "learning_rate", 1.0),
        ("normalize=false", "normalize", False),
        ("normalize=False", "normalize", False),
        ("clip_grad_norm=1.5", "clip_grad_norm", 1.5),
        ("clip_grad_norm=null", "clip_grad_norm", None),
        ("max_update_norm=None", "max_update_norm", None),
        ("loss=dice_bce", "loss", "dice_bce"),
    ],
)
def test_overrides_are_read_by_the_type_of_their_key(override, key, value):
    base = recipe(clip_grad_norm=9.0, max_update_norm=9.0, holdout=["site-4"])
    changed = base.with_overrides([override])
    assert getattr(changed, key) == value
    assert type(getattr(changed, key)) is type(value)
    same = {k: v for k, v in changed.to_dict().items() if k != key}
    assert same == {k: v for k, v in base.to_dict().items() if k != key}


def test_another_backbone_means_its_official_checkpoint():
    changed = recipe().with_overrides(["backbone=vit_h"])
    assert changed.backbone_sha256 == BACKBONES["vit_h"].sha256
    own = recipe().with_overrides(["backbone=vit_h", f"backbone_sha256={'a' * 64}"])
    assert own.backbone_sha256 == "a" * 64


@pytest.mark.parametrize(
    ("override", "problem", "fix"),
    [
        ("round=20", "unknown key 'round'", "did you mean rounds?"),
        ("rounds", "has no '='", "--set NAME=VALUE"),
        ("rounds=many", "rounds=many", "for an example"),
        ("rounds=2.5", "rounds is 2.5", "a whole number"),
        ("rounds=0", "rounds is 0", "1 or more"),
        ("normalize=yes", "normalize=yes", "for an example"),
        ("loss=focal", "loss is 'focal'", "bce, dice_bce"),
        ("classes=", "classes is empty", "at least one class"),
        ("learning_rate=NaN", "learning_rate=NaN", "for an example"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused_with_a_fix(override, problem, fix):
    error = refusal(recipe().with_overrides, [override])
    assert problem in error.problem and fix in error.fix


# ------------------------------------------------------------------------------------------ site


def test_a_site_is_read_with_folders_relative_to_its_file(tmp_path):
    config = site(tmp_path, cache="prepared")
    assert config.data_root == tmp_path / "images-of-the-hospital"
    assert config.cache == tmp_path / "prepared"
    assert config.classes == {"hippocampus": (1, 2)}
    assert config.background == (0,) and config.min_cases == 3


def test_a_folder_that_a_person_names_is_relative_to_where_they_stand(tmp_path, monkeypatch):
    stands = tmp_path / "home"
    stands.mkdir()
    path = write_site(tmp_path / "home", cache="prepared")
    monkeypatch.chdir(tmp_path)
    config = SiteConfig.from_yaml(path, Path("scans"), "--data")
    assert config.data_root == tmp_path / "scans"
    assert config.data_root_named_by == "--data"
    assert config.cache == stands / "prepared"  # written in the file
    assert SiteConfig.from_yaml(path).data_root == stands / "images-of-the-hospital"
    monkeypatch.setenv("HOME", str(stands))
    assert SiteConfig.from_yaml(path, Path("~/x")).data_root == stands / "x"
    path = write_site(stands, SITE + "data_root_named_by: me\n")
    assert "unknown key 'data_root_named_by'" in refusal(SiteConfig.from_yaml, path).problem


def test_the_mounted_folder_goes_before_the_files_own(tmp_path):
    path = write_site(tmp_path)
    assert SiteConfig.from_yaml(path, Path("/data")).data_root == Path("/data")
    path.write_text(SITE.replace("data_root: images-of-the-hospital\n", ""))
    assert SiteConfig.from_yaml(path, Path("/data")).data_root == Path("/data")
    error = refusal(SiteConfig.from_yaml, path)
    assert "where the data is" in error.problem and "SITE_DATA" in error.fix


def test_yaml_reads_1e_4_as_text_and_we_as_a_number(tmp_path):
    assert site(tmp_path, stall_seconds="1e4").stall_seconds == 10_000.0
    assert site(tmp_path, validation_fraction="5e-1").validation_fraction == 0.5


def test_nested_intensity_is_read_and_its_keys_are_checked(tmp_path):
    config = site(tmp_path, intensity="{rule: window, center: 40, width: 400}")
    assert config.intensity == Intensity(rule="window", center=40.0, width=400.0)
    assert config.intensity.bounds == (-160.0, 240.0)
    error = refusal(site, tmp_path, intensity="{rule: window, centre: 40, width: 400}")
    assert "centre" in error.problem and "did you mean center?" in error.fix


def test_intensity_bounds_have_the_defaults_of_their_rule():
    assert Intensity().bounds == (0.5, 99.5)
    assert Intensity(rule="range").bounds == (0.0, 255.0)
    assert Intensity(rule="percentile", low=0.0).bounds == (0.0, 99.5)


@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({"imges": "x/*"}, "imges", "did you mean images?"),
        ({"format": "jpeg"}, "format is 'jpeg'", "nifti, dicom, image, npy"),
        ({"images": "images"}, "images is", "with a *"),
        ({"images": "/data/*.nii"}, "images is", "relative to data_root"),
        ({"labels": "../labels/*.nii"}, "labels is", "relative to data_root"),
        ({"labels": "images/*.nii.gz"}, "the same glob", "label files"),
        ({"classes": "{}"}, "classes is empty", "nucleus: [255]"),
        ({"classes": "{a: []}"}, "class a has no label values", "not_annotated"),
        ({"classes": "{a: 1}"}, "is 1", "write a list"),
        ({"classes": "{a: [0]}"}, "label value 0 is background and class", "not both"),
        ({"classes": "{a b: [1]}"}, "'a b'", "letters, digits"),
        ({"classes": "{a: [70000]}"}, "label value 70000", "-32768 to 32767"),
        ({"classes": "{a: all}"}, "classes, a is 'all'", "nonzero"),
        ({"classes": "{a: [9-2]}"}, "classes, a is '9-2'", "smaller to the larger"),
        ({"classes": "{a: [1-70000]}"}, "label value 32768", "-32768 to 32767"),
        (
            {"classes": "{a: nonzero}", "background": "[0, 255]"},
            "255 is background and class",
            "not both",
        ),
        (
            {"classes": "{a: [1-9]}", "background": "[0, 5-7]"},
            "5 is background and class",
            "not both",
        ),
        ({"pair_by": "name"}, "pair_by is 'name'", "wildcards, folder, patient, reference"),
        ({"pair_by": "reference"}, "format: nifti has no references", "folder"),
        ({"pair_by": "patient"}, "there is no patient", "patient:"),
        ({"patient": '"\\b(p1)"'}, "control character", "single quotes"),
        ({"not_annotated": "[no]"}, "not_annotated holds False", "use quotes"),
        ({"series": "12"}, "series is 12", "use quotes"),
        (
            {"not_annotated": "[hippocampus]"},
            "class hippocampus has label values",
            "one of the two",
        ),
        ({"validation_fraction": "1"}, "validation_fraction is 1", "between 0 and 1"),
        ({"workers": "-1"}, "workers is -1", "0 or more"),
        ({"classes": "[lesion]"}, "classes is ['lesion']", "name: value"),
        ({"micro_batch": "0"}, "micro_batch is 0", "1 or more"),
        ({"min_cases": "0"}, "min_cases is 0", "1 or more"),
        ({"stall_seconds": "0"}, "stall_seconds is 0", "above 0"),
        ({"device": "gpu"}, "device is 'gpu'", "cuda:N"),
        ({"patient": "'(['"}, "no regular expression", "one group"),
        ({"patient": "'[a-z]+'"}, "has 0 groups", "exactly one pair of parentheses"),
        ({"patient": "'(a)(b)'"}, "has 2 groups", "exactly one pair of parentheses"),
        ({"intensity": "{rule: window}"}, "needs center and width", "center: 40"),
        ({"intensity": "{low: 60, high: 40}"}, "low is 60", "low below high"),
        ({"intensity": "{low: 0, high: 255}"}, "percentiles are", "between 0 and 100"),
        ({"intensity": "{center: 40, width: 400}"}, "'percentile' has no center", "rule: window"),
        (
            {"intensity": "{rule: window, center: 40, width: 400, low: 3}"},
            "'window' has no low",
            "rule: range",
        ),
        (
            {"intensity": "{rule: window, center: .nan, width: 4}"},
            "center is nan",
            "write a number",
        ),
        ({"intensity": "{rule: window, center: 0, width: .inf}"}, "width is inf", "a number"),
        ({"intensity": "{rule: range, low: 0, high: .inf}"}, "high is inf", "write a number"),
        ({"images": "'images/[^a]*.nii.gz'"}, "[^ is no sign of a glob", "[!ab]"),
        ({"data_root": "~"}, "data_root is None", "the folder's path"),
        ({"data_root": "''"}, "data_root is ''", "the folder's path"),
        ({"data_root": "2024"}, "data_root is 2024", "the folder's path"),
        ({"data_root": '"C:\\new"'}, "control character", "single quotes"),
        ({"cache": '"a\\0b"'}, "control character", "single quotes"),
        ({"cache": '"\\ud800"'}, "which no folder is called", "the folder's path"),
        ({"cache": "[a]"}, "cache is ['a']", "the folder's path"),
        ({"classes": "nonzero"}, "classes is 'nonzero'", "name: value"),
        ({"classes": "{a: [nonzero, true]}"}, "classes, a holds True", "a whole number"),
        ({"classes": "{a: [1-3, [2]]}"}, "classes, a holds [2]", "a whole number"),
        ({"classes": "{a: }"}, "classes, a is None", "write a list"),
        ({"classes": "&c {a: *c}"}, "recursive", "in quotes"),
    ],
)
def test_a_site_that_cannot_be_meant_is_refused_with_a_fix(tmp_path, changes, problem, fix):
    text = SITE
    for key in changes:  # replaced, not given twice
        text = "".join(
            line
            for line in text.splitlines(keepends=True)
            if not line.startswith(f"{key}:") and not (key == "classes" and "hippocampus" in line)
        )
    path = write_site(tmp_path, text, **changes)
    error = refusal(SiteConfig.from_yaml, path)
    assert problem in error.problem and fix in error.fix


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("nonzero", {*range(-32768, 0), *range(1, 32768)}),
        ("[nonzero]", {*range(-32768, 0), *range(1, 32768)}),
        ('["1-167"]', set(range(1, 168))),
        ("[1-167]", set(range(1, 168))),
        ("1..4", {1, 2, 3, 4}),
        ("[2, 5 - 7, 9]", {2, 5, 6, 7, 9}),
        ("[-3--1]", {-3, -2, -1}),
        ("[4-4]", {4}),
    ],
)
def test_label_values_may_be_ranges(tmp_path, text, values):
    path = write_site(tmp_path, SITE.replace("hippocampus: [1, 2]", f"nucleus: {text}"))
    config = SiteConfig.from_yaml(path)
    assert set(config.classes["nucleus"]) == values
    assert len(config.classes["nucleus"]) == len(values)


@pytest.mark.parametrize(
    ("line", "reason", "cure"),
    [
        ("images: */T2", "line 3", "images: '*/T2'"),
        ("images: *T2", "line 3", "images: '*T2'"),
        ("images: **/x.nii  # all of them", "line 3", "images: '**/x.nii'"),
        ("images: [ab]*.nii", "line 3", "images: '[ab]*.nii'"),
        ("images: &all/*.nii", "line 3", "images: '&all/*.nii'"),
        ("images: !x/*.nii", "line 3", "images: '!x/*.nii'"),
        ("images: %x/*.nii", "cannot start any token", "images: '%x/*.nii'"),
        ("not_annotated:\n  - *x", "line 4", "- '*x'"),
        ('patient: "^(\\d+)_"', "unknown escape character 'd'", "single quotes"),
        ("series: T2: axial", "mapping values are not allowed", "quotes"),
        ("threads:\t4", "line 3", "tab"),
        ("classes:\n\tnucleus: [1]", "line 4", "tab"),
        ("classes:\n  a: [1]\n\tb: [2]", "line 5", "tab"),
        ("classes: [1", "expected ',' or ']'", "at that place"),
    ],
)
def test_the_classic_mistakes_of_yaml_are_told_with_their_cure(tmp_path, line, reason, cure):
    path = write_site(tmp_path, f"data_root: x\nformat: nifti\n{line}\nlabels: l/*.nii\n")
    error = refusal(SiteConfig.from_yaml, path)
    assert reason in error.problem and cure in error.fix


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key a stands twice, first in line 1"),
        ("c:\n  x: [1]\n  x: [2]\n", "line 3: the key x stands twice, first in line 2"),
        ("c: {x: 1, x: 2}\n", "line 1: the key x stands twice, first in line 1"),
        ("l:\n- a: 1\n  a: 2\n", "line 3: the key a stands twice, first in line 2"),
        ("c: {1: a, '1': b}\n", "the key 1 stands twice"),
        ("c:\n  no: [1]\n", "line 2: YAML reads the name no as true or false"),
        ("c: {on: [1]}", "the name on as true"),
        ("c: {2024-01-31: [1]}", "the name 2024-01-31 as a date"),
        ("c: {1_0: [1]}", "the name 1_0 as a number"),
        ("c: {010: [1]}", "the name 010 as a number"),
        ("c: {1:30: [1]}", "the name 1:30 as a number"),
        ("c: {~: [1]}", "the name ~ as nothing"),
        ("c: {a: [010]}", "reads 010 as the number 8"),
        ("c: {a: [1:30]}", "reads 1:30 as the number 90"),
        ("c: 2024-13-40", "month must be in"),
    ],
)
def test_what_yaml_would_read_as_something_else_is_refused(tmp_path, text, says):
    (tmp_path / "any.yml").write_text(text)
    assert says in refusal(read_yaml, tmp_path / "any.yml").problem


def test_plain_yaml_is_read_as_before(tmp_path):
    text = "a: {1: [x], '2': y}\nb: &b {c: yes, d: 0x10}\ne:\n  <<: *b\n  d: -1\n'no': 1.5e+3\n"
    (tmp_path / "any.yml").write_text(text)
    assert read_yaml(tmp_path / "any.yml") == {
        "a": {1: ["x"], "2": "y"},
        "b": {"c": True, "d": 16},
        "e": {"c": True, "d": -1},
        "no": 1500.0,
    }


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_file(tmp_path):
    path = write_site(tmp_path)
    wanted = SiteConfig.from_yaml(path)
    path.write_bytes(SITE.replace("\n", "\r\n").encode("utf-8-sig"))
    assert SiteConfig.from_yaml(path) == wanted
    (tmp_path / "privacy.json").write_bytes('{"min_cases": 7}'.encode("utf-8-sig"))
    assert Policy.from_folder(tmp_path).min_cases == 7
    path.write_bytes(SITE.encode("utf-16"))
    assert "save it again as UTF-8" in refusal(SiteConfig.from_yaml, path).fix


def test_an_error_with_thousands_of_label_values_stays_short(tmp_path):
    path = write_site(tmp_path, SITE.replace("[1, 2]", "[nonzero, true]"))
    assert len(refusal(SiteConfig.from_yaml, path).problem) < 400


def test_text_of_any_editor_is_read_or_the_editor_is_told(tmp_path):
    for name, text in {"a.yml": SITE, "a.json": recipe().to_json()}.items():
        path = tmp_path / name
        read = SiteConfig.from_yaml if name == "a.yml" else Recipe.from_json
        path.write_text(text, encoding="utf-8")
        expected = read(path)
        path.write_text(text, encoding="utf-8-sig")  # with a mark in front, as Windows writes
        assert read(path) == expected
        path.write_text(text, encoding="utf-16")
        error = refusal(read, path)
        assert str(path) in error.problem and "UTF-8" in error.fix
    error = refusal(SiteConfig.from_yaml, tmp_path)
    assert f"{tmp_path} is a folder" in error.problem and "file in it" in error.fix


def test_a_key_that_stands_twice_in_json_is_an_error_with_both_lines(tmp_path):
    text = json.dumps(MINIMAL, indent=1).replace('"rounds": 3', '"rounds": 3,\n "rounds": 30')
    (tmp_path / "recipe.json").write_text(text)
    error = refusal(Recipe.from_json, tmp_path / "recipe.json")
    lines = [str(n) for n, line in enumerate(text.splitlines(), 1) if '"rounds"' in line]
    assert f"the key rounds stands twice (lines {' and '.join(lines)})" in error.problem
    (tmp_path / "privacy.json").write_text('{"min_cases": 30, "min_cases": 3}')
    assert "min_cases stands twice" in refusal(Policy.from_folder, tmp_path).problem


def test_a_damaged_site_file_says_where(tmp_path):
    path = write_site(tmp_path, "data_root: x\nformat: [nifti\n")
    assert "line 3" in refusal(SiteConfig.from_yaml, path).problem
    path.write_text("just a sentence")
    assert "holds no keys" in refusal(SiteConfig.from_yaml, path).problem
    error = refusal(SiteConfig.from_yaml, tmp_path / "nothing.yml")
    assert "there is no" in error.problem


# ---------------------------------------------------------------------------------------- policy


def write_policy(folder, text):
    (folder / "privacy.json").write_text(text)
    return folder


def test_an_empty_policy_is_the_default_and_lets_no_picture_out(tmp_path):
    policy = Policy.from_folder(write_policy(tmp_path, "{}"))
    assert policy == Policy()
    assert policy.pictures is False and policy.min_cases == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"method": ["fedmsa"]}',
        '{"clip_nrm": 1.0}',
        '{"clip_norm": "1,0"}',
        '{"clip_norm": 0}',
        '{"clip_norm": NaN}',
        '{"noise_std": -0.1, "clip_norm": 1.0}',
        '{"noise_std": Infinity, "clip_norm": 1.0}',
        '{"noise_std": 0.5}',
        '{"pictures": "no"}',
        '{"pictures": 0}',
        '{"min_cases": 0}',
        '{"max_rounds": 0}',
        '{"methods": []}',
        '{"methods": ["fed avg"]}',
        '{"methods": "fedmsa"}',
    ],
)
def test_a_policy_that_is_not_exactly_right_closes_the_door(tmp_path, text):
    refusal(Policy.from_folder, write_policy(tmp_path, text))


def test_a_missing_policy_closes_the_door(tmp_path):
    assert "privacy.json" in refusal(Policy.from_folder, tmp_path).problem
    (tmp_path / "privacy.json").mkdir()
    refusal(Policy.from_folder, tmp_path)


def test_noise_is_asked_for_together_with_a_clip(tmp_path):
    text = '{"clip_norm": 1, "noise_std": 0.01, "methods": ["fedmsa"]}'
    policy = Policy.from_folder(write_policy(tmp_path, text))
    assert (policy.clip_norm, policy.noise_std, policy.methods) == (1.0, 0.01, ("fedmsa",))


# ----------------------------------------------------------------------------------- environment


def test_the_environment_names_folders_and_empty_means_none(monkeypatch):
    monkeypatch.setenv("SITE_DATA", "/data")
    monkeypatch.setenv("FEDFMS_EXCHANGE", "")
    monkeypatch.delenv("FEDFMS_CHECKPOINTS", raising=False)
    machine = Machine.from_environment()
    assert machine.site_data == Path("/data")
    monkeypatch.setenv("SITE_DATA", "scans")
    assert Machine.from_environment().site_data == Path.cwd() / "scans"
    assert machine.exchange is None and machine.checkpoints is None


def test_configurations_cannot_be_changed_after_they_were_checked(tmp_path):
    for config in (recipe(), site(tmp_path), Policy(), Intensity()):
        name = next(iter(typing.get_type_hints(type(config))))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)


def test_an_intensity_is_read_as_it_is_described():
    from fedfms.predict.run import describe_intensity

    for text in ("percentile:0:99:truncate", "window:40:400", "range:0:255:truncate"):
        assert describe_intensity(Intensity.from_text(text)) == text
    assert Intensity.from_text("percentile:truncate").rounding == "truncate"
    with pytest.raises(ConfigError, match="cannot be read"):
        Intensity.from_text("percentile:0:99:down")


def test_draws_and_orders_that_mean_nothing_are_refused():
    for bad in ([0.0], [1.0, -1.0], [float("nan")], [1.0] * 101):
        assert "start_draws" in refusal(recipe, start_draws=bad).problem
    assert "twice" in refusal(recipe, site_order=["a", "b", "a"]).problem
    assert recipe(start_draws=[1, 1]).sha256 == recipe(start_draws=["1", 1.0]).sha256


@pytest.mark.parametrize("rate", [5e-324, 1e-9, 0.0, 1.5])
def test_a_rate_of_patients_whose_steps_nobody_can_count_is_refused(rate: float):
    error = refusal(recipe, patient_rate=rate, patient_clip_norm=1.0)
    assert f"patient_rate is {rate}" in error.problem and "from 0.0001 to 1" in error.fix


# ------------------------------------------------------------------------- where a value came from


@pytest.mark.parametrize(
    ("override", "problem"),
    [("rounds=0", "--set: rounds is 0"), ("loss=x", "--set: loss is 'x'")],
)
def test_a_value_given_by_set_is_never_blamed_on_the_file(tmp_path, override, problem):
    (tmp_path / "recipe.json").write_text(json.dumps(MINIMAL))
    error = refusal(Recipe.from_json(tmp_path / "recipe.json").with_overrides, [override])
    assert error.problem == problem
    assert "recipe.json" not in error.problem + error.fix


def test_a_value_of_a_file_is_told_with_the_path_of_that_file(tmp_path):
    cases = [
        (Recipe.from_json, "recipe.json", json.dumps({**MINIMAL, "rounds": 0}), "rounds is 0"),
        (Recipe.from_json, "recipe.json", json.dumps({**MINIMAL, "rounds": "x"}), "rounds is 'x'"),
        (SiteConfig.from_yaml, "site.yml", SITE + "workers: -1\n", "workers is -1"),
        (SiteConfig.from_yaml, "site.yml", SITE + "workers: many\n", "workers is 'many'"),
        (SiteConfig.from_yaml, "site.yml", SITE + "intensity: {rul: range}\n", None),
    ]
    for read, name, text, problem in cases:
        path = tmp_path / name
        path.write_text(text)
        said = problem or "unknown key 'rul'"
        where = str(path) if problem else f"{path}, intensity"
        assert refusal(read, path).problem == f"{where}: {said}"


def test_an_option_of_a_command_is_blamed_as_that_option(tmp_path):
    config = SiteConfig.from_yaml(write_site(tmp_path), Path("/data"), "--data")
    error = refusal(changed, config, {"plane": "slanted"}, OPTIONS)
    assert error.problem == "--plane is 'slanted'"
    assert error.fix == "use one of axial, coronal, sagittal, stored"
    assert refusal(changed, config, {"device": "tpu"}, OPTIONS).problem == "--device is 'tpu'"
    made = changed(config, {"plane": "coronal", "intensity": Intensity(rule="range")}, OPTIONS)
    assert made == dataclasses.replace(config, plane="coronal", intensity=Intensity(rule="range"))
    assert made.data_root_named_by == "--data"


def test_a_value_deep_in_a_file_is_told_with_its_place(tmp_path):
    text = SITE.replace("[1, 2]", "[1, 1.5]")
    assert "classes, hippocampus holds 1.5" in refusal(site_of, tmp_path, text).problem
    dated = SITE + "series: 2024-01-31\n"
    error = refusal(site_of, tmp_path, dated)
    assert "series is datetime.date(2024, 1, 31)" in error.problem and "use quotes" in error.fix
    names = SITE.replace("nifti", "dicom") + "label_names: {a: [x]}\n"
    assert "label_names has the key 'a'" in refusal(site_of, tmp_path, names).problem
    both = SITE + "intensity: {rule: percentil, hihg: 3}\n"
    assert "did you mean high?" in refusal(site_of, tmp_path, both).fix
    half = SITE + 'series: "\\ud800"\n'
    assert "no Unicode" in refusal(site_of, tmp_path, half).problem
    assert "a number or null" in refusal(recipe, clip_grad_norm="much").fix


def site_of(folder, text):
    return SiteConfig.from_yaml(write_site(folder, text))


def test_the_recipes_of_the_jobs_keep_their_hashes():
    jobs = Path(__file__).parents[2] / "jobs"
    hashes = {
        "evaluate": "9f05a2a6e2d16772a9d09c3cfd8113250d2b702be47f6e17903095d2eb760852",
        "fedmsa": "9f05a2a6e2d16772a9d09c3cfd8113250d2b702be47f6e17903095d2eb760852",
        "fedsam": "97f0827e12a1166605b3bcbfc659f068709136f787f4ae7183adc59907abac4e",
    }
    recipes = {name: Recipe.from_json(jobs / name / JOB_RECIPE) for name in hashes}
    assert {one.transfer_precision for one in recipes.values()} == {"fp16"}
    # as they were before they said fp16 and augment: what a recipe.json that says nothing means is
    # fp32, and slices as they are
    before = {
        name: dataclasses.replace(r, transfer_precision="fp32", augment=False)
        for name, r in recipes.items()
    }
    assert {name: recipe.sha256 for name, recipe in before.items()} == hashes
    paper = {
        "fedmsa": "bdbda81ce34cc0e79d79470fd98331869a32af8248aeaa00c9cf809a0de1274d",
        "fedsam": "caa9f78e39184a2213a5fe90e15e1ad4c2abf5750f24e62e68c4b8315d2456c4",
    }
    for name, expected in paper.items():
        assert Recipe.from_json(jobs / f"recipes/{name}-paper.json").sha256 == expected


# --------------------------------------------------------------------------------- a site in parts


def test_a_flat_file_is_read_into_the_parts_of_a_site(tmp_path):
    text = SITE + "plane: coronal\nthreads: 3\nmin_cases: 7\nvalidation_seed: 5\n"
    config = site_of(tmp_path, text)
    assert config.part(Reading) == Reading(format="nifti", plane="coronal")
    assert config.part(Labels) == Labels(classes={"hippocampus": (1, 2)})
    assert config.part(Compute) == Compute(threads=3)
    assert config.part(Folder) == Folder(
        data_root=tmp_path / "images-of-the-hospital",
        format="nifti",
        images="images/*.nii.gz",
        labels="labels/*.nii.gz",
        validation_seed=5,
    )
    assert config.part(Setup) == Setup(format="nifti", plane="coronal", threads=3)
    in_parts = {f.name for kind in (Folder, Reading, Labels, Compute) for f in fields(kind)}
    assert {f.name for f in fields(SiteConfig)} - in_parts == {"min_cases"}


def test_a_part_alone_is_checked_as_in_a_site():
    assert refusal(Reading, format="dicom", plane="stored").fix.startswith("set plane: axial")
    assert refusal(Compute, threads=0).problem == "threads is 0"
    assert "no label values" in refusal(Labels, classes={"a": ()}).problem
    assert refusal(Setup, format="nifti", device="tpu").problem == "device is 'tpu'"


def test_a_folder_whose_name_is_no_text_is_read_as_it_is(tmp_path):
    odd = tmp_path / os.fsdecode(b"M\xfcnchen")
    config = SiteConfig.from_yaml(write_site(tmp_path), odd, "--data")
    assert os.fsencode(config.data_root).endswith(b"M\xfcnchen")
    odd.mkdir()
    written = SiteConfig.from_yaml(write_site(odd, cache="prepared"))
    assert written.cache == odd / "prepared"
    assert changed(written, {"threads": 2}, OPTIONS).cache == odd / "prepared"


def test_a_secure_sum_has_no_eight_bits():
    assert recipe(secure_sum=True, transfer_precision="fp16").sums_only
    with pytest.raises(ConfigError, match="transfer_precision is int8") as caught:
        recipe(secure_sum=True, transfer_precision="int8")
    assert "fp16" in caught.value.fix
    assert recipe(transfer_precision="int8").scored_precision == "fp16"


def test_a_sum_in_32_bits_is_one_of_a_secure_sum():
    assert recipe(secure_sum=True, secure_sum_bits=32).sums_only
    with pytest.raises(ConfigError, match="secure_sum_bits is 32, and secure_sum is false"):
        recipe(secure_sum_bits=32)
    with pytest.raises(ConfigError, match="secure_sum_bits"):
        recipe().with_values({"secure_sum": True, "secure_sum_bits": 16}, "test")
