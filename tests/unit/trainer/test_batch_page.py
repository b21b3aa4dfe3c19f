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
from fedfms.errors import ConfigError
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
