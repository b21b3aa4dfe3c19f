"""What four contrasts of a case are worth beside one, and what one that is missing costs.

    python benchmarks/contrasts.py

Makes patients as FeTS has them, a folder each with _t1, _t1ce, _t2, _flair and _seg, in a temporary
folder. In no contrast alone is the object that is asked for different in grey from all others; in
all four together it is. `fedfms adopt` writes site.yml, `fedfms check-data` looks at it, and
`fedfms train-local` trains `jobs/fedmsa` with vit_demo on four contrasts, on each alone, and on
four of which a patient in eight lacks t1ce. `fedfms predict` finds the object in ten patients that
were not trained on; a JSON line each with the mean Dice over these.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from tiles import fedfms

# grey of the tumour, and of three more objects, in each contrast: none of these three is as bright
# as the tumour in all, and in flair all are
GREYS = {
    "t1": (0.70, 0.70, 0.70, 0.25),
    "t1ce": (0.80, 0.80, 0.30, 0.80),
    "t2": (0.75, 0.30, 0.75, 0.75),
    "flair": (0.65, 0.65, 0.65, 0.65),
}
_SIZE, _SLICES, _BODY, _NOISE = 96, 4, 0.45, 0.03


def patient(seed: int) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.uint8]]:
    """(96, 96, 4) of each contrast, and of the tumour 1."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:_SIZE, :_SIZE] + 0.5
    middle = _SIZE / 2
    body = np.hypot((y - middle) / 42, (x - middle) / 38) < 1
    quarters = random.permutation([(-1, -1), (-1, 1), (1, -1), (1, 1)])
    objects = []
    for down, right in quarters:
        away = random.uniform(13, 20, 2)
        radii = random.uniform(6, 10, 2)
        place = (y - middle - down * away[0]) / radii[0], (x - middle - right * away[1]) / radii[1]
        objects.append(np.hypot(*place))
    thickness = 1 - 0.15 * np.abs(np.arange(_SLICES) - 1.5)
    contrasts = {}
    for name, greys in GREYS.items():
        volume = np.zeros((_SIZE, _SIZE, _SLICES))
        for index, thick in enumerate(thickness):
            level = np.where(body, _BODY, 0.0)
            for away, grey in zip(objects, greys, strict=True):
                level[away < thick] = grey
            volume[..., index] = gaussian_filter(level, 0.8)
        volume += _NOISE * random.standard_normal(volume.shape)
        contrasts[name] = (1000 * volume.clip(0)).astype(np.float32)
    tumour = np.stack([objects[0] < thick for thick in thickness], axis=-1).astype(np.uint8)
    return contrasts, tumour


def write(
    folder: Path, seeds: range, without: tuple[int, ...] = ()
) -> dict[str, NDArray[np.uint8]]:
    """Patients in a tree as FeTS's; their tumours by name. Some lack t1ce."""
    truth = {}
    for seed in seeds:
        name = f"FeTS2022_{seed:05d}"
        (folder / name).mkdir(parents=True)
        contrasts, truth[name] = patient(seed)
        for contrast, volume in contrasts.items():
            if not (contrast == "t1ce" and seed in without):
                file = folder / name / f"{name}_{contrast}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 3, 1])), file)
        label = nibabel.Nifti1Image(truth[name], np.diag([1, 1, 3, 1]))
        nibabel.save(label, folder / name / f"{name}_seg.nii.gz")
    return truth


def learnt(
    site: Path, contrasts: list[str], new: Path, truth: dict[str, NDArray[np.uint8]], rounds: int
) -> float:
    """Mean Dice over new patients of a model that this site trains on these contrasts."""
    with tempfile.TemporaryDirectory() as folder:
        model, masks = Path(folder, "model/model.safetensors"), Path(folder, "masks")
        values = {"classes": "tumour", "rounds": rounds, "contrasts": ",".join(contrasts)}
        said = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        fedfms("train-local", "fedmsa", "--site", site, *said, "--output", model)
        fedfms("predict", model, new, masks, "--site", site)
        scores = []
        for name, tumour in truth.items():
            (file,) = masks.rglob(f"{name}*.nii.gz")
            found = np.asarray(nibabel.load(file).dataobj) > 0
            scores.append(2 * (found & (tumour > 0)).sum() / max(1, found.sum() + tumour.sum()))
    return float(np.mean(scores))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patients", type=int, default=16, help="that are trained on")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        truth = write(root / "new", range(1000, 1010))
        for name, without in (("whole", ()), ("gaps", tuple(range(0, options.patients, 8)))):
            write(root / name, range(options.patients), without)
            site = root / f"{name}.yml"
            fedfms("adopt", root / name, "--output", site)
            said = yaml.safe_load(site.read_text())
            said["classes"] = {"tumour": [1]}
            site.write_text(yaml.safe_dump(said))
            fedfms("check-data", site)
            rows = [list(GREYS)]
            if not without:
                rows += [[contrast] for contrast in GREYS]
            for contrasts in rows:
                dice = learnt(site, contrasts, root / "new", truth, options.rounds)
                row = {"site": name, "contrasts": contrasts, "without_t1ce": len(without)}
                row |= {"dice": round(dice, 3), "missing": said.get("missing_contrast")}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
