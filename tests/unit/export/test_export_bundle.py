"""The bundle in MONAI's own hands, offline: its masks are those of our evaluation."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import monai.bundle
import monai.bundle.scripts
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle.properties import InferProperties, MetaProperties

from fedfms.contracts.site import Intensity, Setup, SiteConfig
from fedfms.control import Control
from fedfms.data.formats import read_label
from fedfms.data.manifest import Case, find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import ConfigError
from fedfms.export.bundle import LARGEST_DIFFERENCE, _difference
from fedfms.export.run import export_model
from fedfms.local.synthetic import write_phantom_site
from fedfms.models.trained import load_trained
from fedfms.training.evaluate import foreground, predict

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = Path(__file__).with_name("meta_schema_20240725.json")


# ------------------------------------------------------------------------------------- helpers


def phantoms(folder: Path, style: str, slices: int = 3, **changes: Any) -> SiteConfig:
    write_phantom_site(folder, style, cases=2, slices=slices, seed=4)
    site = SiteConfig.from_yaml(folder / "site.yml")
    return dataclasses.replace(site, device="cpu", **changes)


def site_file(folder: Path, site: SiteConfig) -> Path:
    """A site.yml, as a coordinator would get it from a site: without that site's folders."""
    intensity = {k: v for k, v in dataclasses.asdict(site.intensity).items() if v is not None}
    values = {
        "format": "nifti",
        "images": site.images,
        "labels": site.labels,
        "classes": {name: list(values) for name, values in site.classes.items()},
        "plane": site.plane,
        "channels": site.channels,
        "intensity": intensity,
    }
    file = folder / "given-site.yml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


def arguments(bundle: Path, **others: object) -> dict[str, str]:
    files = {
        "bundle_root": bundle,
        "config_file": bundle / "configs/inference.json",
        "meta_file": bundle / "configs/metadata.json",
    }
    return {name: str(value) for name, value in {**files, **others}.items()}


def our_masks(source: Path, cases: list[Case], site: SiteConfig) -> list[np.ndarray]:
    """(K, D, H, W) bool of each case, by the code that evaluates."""
    trained = load_trained(source, None)
    prepared = prepare_cases(cases, site)
    slices = [(case, index) for case in prepared for index in range(len(case.images))]
    stream = predict(trained.model, slices, trained.recipe, site, Control())
    masks = []
    for case in prepared:
        logits = torch.stack([next(stream) for _ in case.images])
        masks.append(foreground(logits, case, trained.recipe))
    return masks


def bundles_masks(
    folder: Path, case: Case, site: SiteConfig, *, exclusive: bool = False
) -> np.ndarray:
    """(K, D, H, W) bool of a mask file, turned by the code that reads our labels.

    exclusive: the file is a label map of two classes, not a mask for each.
    """
    name = case.image.name.removesuffix(".gz").removesuffix(".nii")
    saved, original = nibabel.load(folder / f"{name}_seg.nii.gz"), nibabel.load(case.image)
    np.testing.assert_allclose(saved.affine, original.affine, atol=1e-5)
    assert saved.shape[:3] == original.shape[:3]
    values = np.asanyarray(saved.dataobj)
    assert values.dtype == np.uint8
    if exclusive:
        assert values.ndim == 3
        values = np.stack([values == 1, values == 2], axis=-1).astype(np.uint8)
    assert set(np.unique(values)) <= {0, 1}
    values = values.reshape(*original.shape[:3], -1)
    masks = []
    for index in range(values.shape[3]):
        part = folder / "part.nii"
        nibabel.save(nibabel.Nifti1Image(values[..., index], saved.affine), part)
        masks.append(read_label(part, part.read_bytes(), site).values == 1)
        part.unlink()
    return np.stack(masks)


# --------------------------------------------------------------------------------------- masks


CASES = {
    # phantoms are stored along RAS, LPS, PIR and LAI
    "axial-gray": ("bright", {}, {}),
    "coronal-window": (
        "noisy",
        {"plane": "coronal", "intensity": Intensity(rule="window", center=700.0, width=900.0)},
        {"classes": ("lesion", "other"), "probability_threshold": 0.4},
    ),
    "sagittal-neighbours": (
        "inverted",
        {"plane": "sagittal", "channels": "neighbours"},
        {"method": "fedsam", "classes": ("lesion", "other")},
    ),
    "exclusive": (
        "noisy",
        {"plane": "sagittal"},
        {"classes": ("lesion", "other"), "exclusive_classes": True, "probability_threshold": 0.4},
    ),
    "axial-range-stretched": (
        "unseen",
        {"intensity": Intensity(rule="range", low=1000.0, high=25000.0), "channels": "neighbours"},
        {"method": "fedsam", "resize": "stretch", "normalize": False},
    ),
    "paper": (
        "bright",
        {"intensity": Intensity(low=0.0, high=99.0, rounding="truncate")},
        {"method": "fedmsa", "paper_compat": True, "image_size": 80},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_masks_are_voxel_for_voxel_those_of_our_evaluation(tmp_path, results, name):
    style, settings, recipe = CASES[name]
    site = phantoms(tmp_path / "site", style, **settings)
    site = dataclasses.replace(site, classes={**site.classes, "other": (9,)})
    source = results(**recipe)
    bundle = tmp_path / "bundle"
    done = export_model(source, bundle, "bundle", site=site_file(tmp_path, site))
    assert done.largest_difference < 2e-5  # of logits: attention is recorded in its folded form
    monai.bundle.run(
        **arguments(bundle, dataset_dir=tmp_path / "site/images", output_dir=tmp_path / "masks")
    )
    cases = find_cases(site)
    for case, expected in zip(cases, our_masks(source, cases, site), strict=True):
        exclusive = recipe.get("exclusive_classes", False)
        got = bundles_masks(tmp_path / "masks", case, site, exclusive=exclusive)
        assert 0.01 < expected.mean() < 0.999
        # grey levels may differ by one in some voxels (docs/export.md); no mask did so far
        assert int((got != expected).sum()) <= 1e-4 * expected.size


@pytest.mark.parametrize("batch_size", [1, 2])
def test_thick_slices_keep_their_shape_in_the_bundle(tmp_path, results, batch_size):
    """Also where the evaluator of other programs runs it, which hands over batches."""
    site = phantoms(tmp_path / "site", "bright", plane="sagittal")
    source = results()
    for image in (tmp_path / "site/images").iterdir():
        volume = nibabel.load(image)
        thick = volume.affine @ np.diag([1, 1, 3.3, 1])
        nibabel.save(nibabel.Nifti1Image(np.asanyarray(volume.dataobj), thick), image)
        label = nibabel.load(tmp_path / "site/labels" / image.name)
        nibabel.save(
            nibabel.Nifti1Image(np.asanyarray(label.dataobj), thick),
            tmp_path / "site/labels" / image.name,
        )
    export_model(source, tmp_path / "bundle", "bundle", site=site_file(tmp_path, site))
    files = arguments(
        tmp_path / "bundle", dataset_dir=tmp_path / "site/images", output_dir=tmp_path / "masks"
    )
    parser = monai.bundle.ConfigParser()
    parser.read_config(files["config_file"])
    for key in ("bundle_root", "dataset_dir", "output_dir"):
        parser[key] = files[key]
    parser["dataloader#batch_size"] = batch_size
    parser.get_parsed_content("initialize")
    parser.get_parsed_content("evaluator").run()
    cases = find_cases(site)
    for case, expected in zip(cases, our_masks(source, cases, site), strict=True):
        got = bundles_masks(tmp_path / "masks", case, site)
        assert 0.01 < expected.mean() < 0.999
        assert int((got != expected).sum()) <= 1e-4 * expected.size


def test_real_volumes_get_the_masks_of_our_evaluation(tmp_path, results, shared_data):
    name = "hippocampus/scanner-c"
    given = ROOT / "sites/examples" / name / "site.yml"
    site = dataclasses.replace(
        SiteConfig.from_yaml(given, data_root=shared_data / name), device="cpu"
    )
    cases = find_cases(site)[:3]
    (tmp_path / "images").mkdir()
    for case in cases:
        shutil.copy(case.image, tmp_path / "images")
    source = results(classes=("hippocampus", "anterior"))
    export_model(source, tmp_path / "bundle", "bundle", site=given)
    monai.bundle.run(
        **arguments(
            tmp_path / "bundle", dataset_dir=tmp_path / "images", output_dir=tmp_path / "masks"
        )
    )
    for case, expected in zip(cases, our_masks(source, cases, site), strict=True):
        got = bundles_masks(tmp_path / "masks", case, site)
        assert 0.01 < expected.mean() < 0.999
        assert int((got != expected).sum()) <= 1e-4 * expected.size


def test_it_runs_where_this_package_is_not_installed(tmp_path, results):
    site = phantoms(tmp_path / "site", "bright")
    source = results()
    export_model(source, tmp_path / "bundle", "bundle", site=site_file(tmp_path, site))
    moved = (tmp_path / "bundle").rename(tmp_path / "received")
    given = arguments(moved, dataset_dir=tmp_path / "site/images", output_dir=tmp_path / "masks")
    code = (
        "import json, sys\n"
        "for name in ('fedfms', 'segment_anything', 'nvflare'):\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
        "import monai.bundle\n"
        "monai.bundle.run(**json.loads(sys.argv[1]))\n"
    )
    # not from the repository's root, and without its paths
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps(given)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 volumes" in done.stdout
    cases = find_cases(site)
    for case, expected in zip(cases, our_masks(source, cases, site), strict=True):
        np.testing.assert_array_equal(bundles_masks(tmp_path / "masks", case, site), expected)


# ------------------------------------------------------------------------------ MONAI's own tools


def metadata_check(file: Path) -> str:
    """MONAI's own command on our copy of its schema: what it says, or "" if it is content."""
    command = [sys.executable, "-m", "monai.bundle", "verify_metadata"]
    done = subprocess.run(
        [*command, "--meta_file", str(file), "--filepath", str(SCHEMA)],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_monai_verifies_metadata_and_network(tmp_path, results):
    for number, (recipe, channels) in enumerate(
        [({"classes": ("disc", "cup")}, "neighbours"), ({"method": "fedsam"}, "gray")]
    ):
        site = phantoms(tmp_path / f"site{number}", "bright", channels=channels)
        bundle = tmp_path / f"bundle{number}"
        export_model(
            results(f"results{number}", **recipe),
            bundle,
            "bundle",
            site=site_file(tmp_path, site),
        )
        assert metadata_check(bundle / "configs/metadata.json") == ""
        monai.bundle.verify_net_in_out("network_def", device="cpu", **arguments(bundle))
        parser = monai.bundle.ConfigParser()
        parser.read_config(bundle / "configs/inference.json")
        parser.read_meta(bundle / "configs/metadata.json")
        required = {k: v for k, v in {**InferProperties, **MetaProperties}.items() if v["required"]}
        assert len(required) > 8
        for name, wanted in required.items():
            assert wanted["id"] in parser, f"{name}, which MONAI looks for, is missing"


def test_the_checks_of_metadata_can_fail(tmp_path, results):
    export_model(results(), tmp_path / "bundle", "bundle")
    file = tmp_path / "bundle/configs/metadata.json"
    whole = json.loads(file.read_text())
    without = {key: value for key, value in whole.items() if key != "task"}
    file.write_text(json.dumps(without))
    assert "'task' is a required property" in metadata_check(file)
    whole["network_data_format"]["inputs"]["image"]["num_channels"] = 2
    file.write_text(json.dumps(whole))
    with pytest.raises(RuntimeError):
        monai.bundle.verify_net_in_out(
            "network_def", device="cpu", **arguments(tmp_path / "bundle")
        )


# --------------------------------------------------------------------------------- what is inside


def test_the_network_file_names_no_path_and_fixes_no_device(tmp_path, results):
    export_model(results(image_size=80), tmp_path / "bundle", "bundle")  # 80: padded windows
    file = tmp_path / "bundle/models/model.ts"
    with zipfile.ZipFile(file) as archive:
        for entry in archive.namelist():
            data = archive.read(entry)
            for folder in (ROOT, Path(sys.prefix).resolve(), Path(torch.__file__).parents[1]):
                assert str(folder).encode() not in data, entry
    assert {path.name for path in (tmp_path / "bundle/models").iterdir()} == {"model.ts"}
    graph = str(torch.jit.load(file).inlined_graph)
    devices = re.findall(r"(%\S+) : Device = prim::Constant", graph)
    uses = {
        line.split("= ", 1)[1].split("(", 1)[0]
        for line in graph.splitlines()
        for device in devices
        if re.search(rf"{re.escape(device)}[,)]", line)
    }
    # tables of positions are indexed by numbers made on the processor, which a GPU accepts
    assert uses <= {"aten::arange", "aten::cpu", "aten::to"}, uses


def test_the_check_before_it_is_handed_over_sees_another_network(tmp_path, results):
    source = results()
    export_model(source, tmp_path / "bundle", "bundle")
    trained = load_trained(source, None)
    file, site = tmp_path / "bundle/models/model.ts", Setup(format="nifti")
    assert _difference(file, trained, site) < 2e-5
    with torch.no_grad():
        trained.model.mask_decoder.mask_tokens.weight[0] += 0.01
    assert _difference(file, trained, site) > LARGEST_DIFFERENCE


def test_what_the_site_did_is_written_down(tmp_path, results):
    site = phantoms(tmp_path / "site", "bright", plane="coronal", channels="neighbours")
    export_model(results(), tmp_path / "bundle", "bundle", site=site_file(tmp_path, site))
    metadata = json.loads((tmp_path / "bundle/configs/metadata.json").read_text())
    assert metadata["fedfms"]["site"] == {
        "plane": "coronal",
        "channels": "neighbours",
        "intensity": {"rule": "percentile", "bounds": [0.5, 99.5], "rounding": "nearest"},
    }
    assert metadata["fedfms"]["recipe"]["classes"] == ["lesion"]
    readme = (tmp_path / "bundle/docs/README.md").read_text()
    assert "coronal slices, each with its two neighbours" in readme
    assert "percentile 0.5 to 99.5" in readme
    for path in (tmp_path / "bundle").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_without_a_site_the_defaults_of_site_yml_are_used_and_said(tmp_path, results):
    done = export_model(results(), tmp_path / "bundle", "bundle")
    assert any("site.yml's defaults" in note and "--site" in note for note in done.notes)
    metadata = json.loads((tmp_path / "bundle/configs/metadata.json").read_text())
    assert metadata["fedfms"]["site"]["plane"] == "axial"
    assert metadata["fedfms"]["site"]["intensity"]["bounds"] == [0.5, 99.5]


def test_a_job_in_bf16_is_exported_in_fp32_and_says_so(tmp_path, results):
    done = export_model(results(precision="bf16"), tmp_path / "bundle", "bundle")
    assert any("fp32" in note for note in done.notes)
    export_model(results("plain"), tmp_path / "same", "bundle")
    grey = torch.randint(0, 256, (1, 1, 50, 70)).float()
    one, other = (torch.jit.load(tmp_path / n / "models/model.ts") for n in ("bundle", "same"))
    with torch.no_grad():
        assert torch.equal(one(grey), other(grey))


@pytest.mark.parametrize("changes", [{"format": "image"}, {"channels": "rgb"}])
def test_pictures_are_refused(tmp_path, results, changes):
    site = dataclasses.replace(phantoms(tmp_path / "site", "bright"), channels="gray")
    values = json.loads(site_file(tmp_path, site).read_text())
    (tmp_path / "given-site.yml").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ConfigError, match="reads grey NIfTI volumes") as error:
        export_model(results(), tmp_path / "bundle", "bundle", site=tmp_path / "given-site.yml")
    assert "--as onnx" in error.value.fix
    assert not (tmp_path / "bundle").exists()


def test_the_order_of_one_sites_own_files_is_refused(tmp_path, results):
    site = dataclasses.replace(phantoms(tmp_path / "site", "bright"), plane="stored")
    with pytest.raises(ConfigError, match="the order of that site's own files") as error:
        export_model(results(), tmp_path / "bundle", "bundle", site=site_file(tmp_path, site))
    assert "axial" in error.value.fix
    assert not (tmp_path / "bundle").exists()
