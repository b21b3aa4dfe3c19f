"""`plane: stored`: slices as the file has them, which is how FedFMS reads its prostate volumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel import orientations
from site_files import site_config

from fedfms.contracts.site import SiteConfig
from fedfms.data.content import read_bytes
from fedfms.data.formats import read_image, read_label
from fedfms.data.grid import Cut
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import ConfigError

VOXELS = np.random.default_rng(3).integers(1, 900, (7, 5, 3)).astype(np.int16)
CODES = ("RAS", "LPS", "PIR", "SAL", "LAS")


def save(path: Path, codes: str) -> np.ndarray:
    """A volume of 0.5 x 0.8 x 4 mm along its own axes, which lie as `codes` say."""
    path.parent.mkdir(exist_ok=True)
    way = orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    for axis, ((to, sign), size) in enumerate(zip(way, (0.5, 0.8, 4.0), strict=True)):
        affine[int(to), axis] = sign * size
    affine[3, 3] = 1
    nibabel.save(nibabel.Nifti1Image(VOXELS, affine), path)
    return nibabel.load(path).get_fdata()


@pytest.mark.parametrize("codes", CODES)
def test_slices_are_the_files_third_axis_as_it_is(tmp_path: Path, codes: str) -> None:
    path = tmp_path / "images" / "a.nii.gz"
    stored = save(path, codes)
    site = site_config(tmp_path, plane="stored")
    read = read_image(path, read_bytes(path, site), site)
    for index in range(stored.shape[2]):
        np.testing.assert_array_equal(read.values[index], stored[:, :, index])
    assert read.spacing == pytest.approx((4.0, 0.5, 0.8))
    assert read.cut is not None
    np.testing.assert_array_equal(read.cut.voxels(read.values), stored)
    drawn = read_label(path, read_bytes(path, site), site)
    np.testing.assert_array_equal(drawn.values[1], stored[:, :, 1])


def test_it_is_the_transpose_of_what_radiologists_see_for_the_usual_axial_volume(
    tmp_path: Path,
) -> None:
    path = tmp_path / "images" / "a.nii.gz"
    save(path, "LPS")
    sites = [site_config(tmp_path, plane=plane) for plane in ("stored", "axial")]
    stored, axial = (read_image(path, read_bytes(path, site), site).values for site in sites)
    np.testing.assert_array_equal(stored, axial.transpose(0, 2, 1))


def test_a_single_slice_is_cut_where_the_file_says() -> None:
    cut = Cut.of(np.diag([1.0, 1.0, 5.0, 1.0]), (1, 6, 4), "stored")
    assert cut.slices(np.zeros((1, 6, 4))).shape == (4, 1, 6)


def test_cases_of_one_and_the_other_plane_are_not_taken_for_each_other_in_the_cache(
    tmp_path: Path,
) -> None:
    for part in ("images", "labels"):
        for name in ("a", "b"):
            save(tmp_path / part / f"{name}.nii.gz", "LPS")
    values = sorted(set(VOXELS.ravel().tolist()))
    changes = {"cache": tmp_path / "cache", "classes": {"lesion": tuple(values)}}
    for plane, shape in (("axial", (3, 5, 7)), ("stored", (3, 7, 5)), ("axial", (3, 5, 7))):
        site = dataclasses.replace(site_config(tmp_path, **changes), plane=plane)
        case = prepare_cases(find_cases(site)[:1], site)[0]
        assert case.images.shape == case.labels.shape == shape


def test_a_dicom_series_has_no_stored_plane() -> None:
    with pytest.raises(ConfigError, match="has no order of its own") as caught:
        SiteConfig(
            data_root=Path(),
            format="dicom",
            images="images/*",
            labels="labels/*",
            classes={"lesion": (1,)},
            plane="stored",
        )
    assert "axial" in caught.value.fix
