"""Pictures of what a network sees: those of training, for this user only, and no name."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
import stat
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from trainer_process import Place
from typer.testing import CliRunner

from fedfms.cli import app
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError, SiteDataError
from fedfms.geometry import pixel_statistics
from fedfms.trainer.batch_page import BATCH_PAGE, show_batch


def pictures(page: Path) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    return [np.array(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_a_page_has_each_slice_as_it_is_and_as_it_may_become(place: Place, recipe: Recipe) -> None:
    recipe = dataclasses.replace(
        recipe, augment=True, augment_inversion=1.0, augment_probability=0.0
    )
    site = SiteConfig.from_yaml(place.data / "site.yml")
    old = os.umask(0)
    try:
        page = show_batch(site, recipe, place.work, slices=2, variants=3)
    finally:
        os.umask(old)
    assert page == place.work / BATCH_PAGE and stat.S_IMODE(page.stat().st_mode) == 0o600
    shown = pictures(page)
    assert len(shown) == 2 * (1 + 3)
    training = [case for case in find_cases(site) if case.split == "train"]
    dataset = SliceDataset(prepare_cases(training, site), site, recipe)
    mean, std = (np.array(one)[:, None, None] for one in pixel_statistics(recipe))
    inputs = [
        np.rint(dataset[item]["image"].numpy() * std + mean).transpose(1, 2, 0)
        for item in range(len(dataset))
    ]

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        grey = Image.fromarray(other.astype(np.uint8)).resize(one.shape[:2], 2)
        plain = (one[..., 0] == one[..., 1]) & (one[..., 1] == one[..., 2])  # no contour
        return float(np.abs(one.astype(int) - np.array(grey, int))[plain].mean())

    for first in (0, 4):
        fits = [apart(shown[first], one) for one in inputs]
        assert min(fits) < 0.5
        colours = shown[first].max(axis=2) != shown[first].min(axis=2)
        assert colours.any(), "the mask's contour"
        for one in shown[first + 1 : first + 4]:
            assert apart(one, 255 - inputs[int(np.argmin(fits))]) < 0.5
    text = re.sub(r'"data:[^"]+"', "", page.read_text())
    assert "inverted" in text and "never leaves the site" in text
    for case in training:
        assert case.key not in text and case.patient not in text and case.image.name not in text
    assert not list(place.work.glob("cache*")), "nothing that is prepared stays"


def test_the_command_says_where_it_is_and_needs_no_run_before(place: Place) -> None:
    arguments = ["show-batch", "--config", str(place.data / "site.yml"), "--work", str(place.work)]
    arguments += ["--job", "fedmsa", "--slices", "1", "--set", "image_size=64", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert Path(said["page"]) == place.work / BATCH_PAGE
    assert len(pictures(place.work / BATCH_PAGE)) == (1 + 4 if said["augments"] else 1)


@pytest.mark.parametrize("asked", [{"slices": 0}, {"variants": 0}, {"slices": 200}])
def test_a_page_of_nothing_or_of_everything_is_refused(place: Place, recipe, asked) -> None:
    site = SiteConfig.from_yaml(place.data / "site.yml")
    with pytest.raises(ConfigError, match="at least one of each"):
        show_batch(site, recipe, place.work, **asked)


def contrasts_and_void(root: Path) -> SiteConfig:
    """Six cases of two contrasts, a class, and a void stripe; one of the images is damaged."""
    for number in range(6):
        random = np.random.default_rng(number)
        label = np.zeros((32, 32, 1), np.uint8)
        label[8:20, 10:24], label[:, 28:] = 1, 9
        for name, sign in (("t1", 1), ("flair", -1)):
            folder = root / name
            folder.mkdir(parents=True, exist_ok=True)
            values = random.normal(100, 4, label.shape) + sign * 40 * (label == 1)
            image = nibabel.Nifti1Image(values.astype(np.float32), np.eye(4))
            nibabel.save(image, folder / f"p{number}.nii.gz")
        (root / "labels").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), root / "labels" / f"p{number}.nii.gz")
    site = SiteConfig(
        data_root=root,
        format="nifti",
        images="t1/*.nii.gz",
        contrasts={"t1": "t1/*.nii.gz", "flair": "flair/*.nii.gz"},
        labels="labels/*.nii.gz",
        classes={"disc": (1,)},
        void=(9,),
        leave_out=0.2,
        device="cpu",
    )
    damaged = [case for case in find_cases(site) if case.split == "train"][2]
    (root / "flair" / damaged.image.name).write_bytes(b"nothing that can be read")
    return site


def test_each_contrast_has_its_row_void_is_striped_and_a_damaged_case_is_passed_over(
    tmp_path: Path, recipe: Recipe
) -> None:
    site = contrasts_and_void(tmp_path / "data")
    changes = {"augment": True, "augment_inversion": 1.0, "augment_probability": 0.0}
    recipe = dataclasses.replace(
        recipe, classes=("disc",), contrasts=("flair", "t1"), holdout=(), **changes
    )
    page = show_batch(site, recipe, tmp_path / "work", slices=6, variants=1)
    shown = pictures(page)
    readable = len([case for case in find_cases(site) if case.split == "train"]) - 1
    assert readable >= 3
    assert len(shown) == readable * 2 * (1 + 1), (
        "all that can be read, two contrasts, as it is and inverted"
    )
    text = re.sub(r'"data:[^"]+"', "", page.read_text())
    assert "flair, as it is" in text and "t1, as it is" in text and "Striped" in text
    bright = []
    for flair, inverted, t1, _ in zip(*(shown[n::4] for n in range(4)), strict=True):
        for one in (flair, inverted, t1):
            red = (one == (221, 51, 51)).all(axis=2)  # the first of the file's second axis is below
            assert red[:24].mean() == pytest.approx(0.25, abs=0.02)
            assert not red[34:].any(), "stripes lie over void pixels alone"
        inner, outer = (slice(90, 150), slice(110, 180)), (slice(200, 250), slice(20, 80))
        bright.append([one[inner].mean() > one[outer].mean() for one in (flair, inverted, t1)])
    assert bright == [[False, True, True]] * readable
    strict = dataclasses.replace(site, leave_out=0.0)
    with pytest.raises(SiteDataError, match=r"flair/p\d\.nii\.gz"):
        show_batch(strict, recipe, tmp_path / "work", slices=6, variants=1)
    with pytest.raises(ConfigError, match="of 2 contrasts"):
        show_batch(site, recipe, tmp_path / "work", slices=60, variants=4)
