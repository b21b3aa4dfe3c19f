"""The example sites on the real images beside the checkout (not part of the repository)."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from site_files import recipe

from fedfms.contracts.policy import Policy
from fedfms.contracts.site import SiteConfig
from fedfms.data.check import check_data
from fedfms.data.classes import class_masks
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.geometry import Frame, to_native

EXAMPLES = Path(__file__).resolve().parents[3] / "sites" / "examples"
SITES = {
    "hippocampus/scanner-a": 24,
    "hippocampus/scanner-b": 32,
    "hippocampus/scanner-c": 16,
    "nuclei/fluorescence-256": 40,
    "nuclei/fluorescence-360": 30,
    "nuclei/fluorescence-520": 24,
    "nuclei/histology-320": 40,
}


def test_every_example_is_tested():
    found = {path.parent.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("site.yml")}
    assert found == set(SITES)


def example(name: str, shared_data: Path) -> SiteConfig:
    return SiteConfig.from_yaml(EXAMPLES / name / "site.yml", data_root=shared_data / name)


@pytest.mark.parametrize("name", SITES)
def test_an_example_site_fits_its_data(name, shared_data):
    site = example(name, shared_data)
    assert check_data(site, list(site.classes)) == []
    cases = find_cases(site)
    assert len(cases) == SITES[name]
    validation = sum(case.split == "validation" for case in cases)
    assert validation == round(0.2 * len(cases))
    assert Policy.from_folder(EXAMPLES / name / "policy").min_cases <= validation


def test_hippocampus_volumes_as_nibabel_reads_them(shared_data):
    site = example("hippocampus/scanner-b", shared_data)
    job = recipe(classes=("hippocampus", "anterior", "posterior"))
    for case in prepare_cases(find_cases(site)[:4], site):
        image = nibabel.as_closest_canonical(nibabel.load(case.case.image))
        label = nibabel.as_closest_canonical(nibabel.load(case.case.label))
        values, drawn = image.get_fdata(), np.asanyarray(label.dataobj)
        low, high = np.percentile(values, (0.5, 99.5))
        grey = np.clip((values - low) / (high - low), 0, 1) * 255
        sagittal = grey.transpose(0, 2, 1)[:, ::-1, ::-1]
        assert np.abs(case.images - sagittal).max() < 0.51
        np.testing.assert_array_equal(case.labels, drawn.transpose(0, 2, 1)[:, ::-1, ::-1])
        assert case.spacing == pytest.approx((1.0, 1.0, 1.0))
        masks = class_masks(case, site, job)
        assert masks.sum(dim=(1, 2, 3)).tolist() == [
            np.isin(drawn, values).sum() for values in ((1, 2), (1,), (2,))
        ]


def test_nuclei_as_pillow_reads_them(shared_data):
    site = example("nuclei/histology-320", shared_data)
    for case in prepare_cases(find_cases(site)[:4], site):
        with Image.open(case.case.image) as stored:
            np.testing.assert_array_equal(case.images[0], np.asarray(stored.convert("RGB")))
        with Image.open(case.case.label) as stored:
            np.testing.assert_array_equal(case.labels[0], np.asarray(stored))


@pytest.mark.parametrize(
    ("name", "class_name", "best"),
    [("hippocampus/scanner-c", "hippocampus", 0.97), ("nuclei/fluorescence-256", "nucleus", 0.75)],
)
def test_what_a_perfect_network_could_score(name, class_name, best, shared_data):
    """Native Dice per case of the targets themselves, whose masks have 64 pixels a side.

    Nuclei are a few of them wide; the mean is 0.86 (nearest neighbour 0.78), at 1024 pixels 1.00.
    """
    site = example(name, shared_data)
    job = recipe(classes=(class_name,))
    for case in prepare_cases(find_cases(site)[:5], site):
        truth = class_masks(case, site, job)[0]
        data = SliceDataset([case], site, job)
        drawn = [index for _, index in data.slices]
        predicted = np.zeros(truth.shape, bool)
        for item, index in enumerate(drawn):
            logits = data[item]["target"][None] * 10 - 5
            predicted[index] = to_native(logits, Frame.of(case), job)[0, 0] >= 0
        overlap = 2 * (predicted & truth.numpy()).sum() / (predicted.sum() + truth.sum().item())
        assert overlap > best
