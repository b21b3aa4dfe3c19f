"""Small objects in a picture that is larger than a network's input: found or not, and the memory.

    python benchmarks/tiles.py            predicts a picture of 9,000 x 11,000
    python benchmarks/tiles.py --size 3000 4000

Makes pictures of discs 40 pixels across, and rings as wide that are none, on noise in a temporary
folder, trains `jobs/fedmsa` with vit_demo on eight of 1024 x 1024, once in parts (`tile=512`) and
once as a whole, and predicts a large one with each by `fedfms predict`. Prints one JSON object: of
each way how many of the discs a mask meets, how many of its regions meet none, Dice, seconds, and
the most memory that the process had resident. Ends with 1 where a disc is missed in parts or the
memory is above 2 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

LIMIT_BYTES = 2e9
_ACROSS = 40  # pixels
_COMMAND = "import sys; from fedfms.cli import main; sys.exit(main())"
_BACKGROUND, _OBJECT, _NOISE = 90, 150, 12
_SITE = """\
data_root: .
format: image
images: images/*.png
labels: labels/*.png
classes:
  disc: [1]
intensity: {rule: range, low: 0, high: 255}
device: cpu
"""


def picture(
    height: int, width: int, discs: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(H, W) grey levels and the mask of the discs; each object has a square of its own."""
    random = np.random.default_rng(seed)
    noise = random.normal(0, _NOISE, (1024, 1024)).astype(np.int8)
    grey = np.full((height, width), _BACKGROUND, np.uint8)
    mask = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:_ACROSS, :_ACROSS] - (_ACROSS - 1) / 2
    away = np.hypot(y, x)
    disc = away <= _ACROSS / 2
    ring = disc & (away > _ACROSS / 4)
    squares = np.argwhere(np.ones((height // (2 * _ACROSS), width // (2 * _ACROSS))))
    chosen = squares[random.choice(len(squares), 2 * discs, replace=False)]
    for number, (row, column) in enumerate(chosen * 2 * _ACROSS):
        top, left = row + random.integers(0, _ACROSS), column + random.integers(0, _ACROSS)
        place = slice(top, top + _ACROSS), slice(left, left + _ACROSS)
        grey[place][disc if number < discs else ring] = _OBJECT
        if number < discs:
            mask[place][disc] = 1
    for top in range(0, height, 1024):
        for left in range(0, width, 1024):
            part = grey[top : top + 1024, left : left + 1024]
            part += noise[: part.shape[0], : part.shape[1]].view(np.uint8)  # wraps, as it should
    return grey, mask


def write_site(root: Path, pictures: int = 8) -> None:
    """A site of small pictures."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for number in range(pictures):
        grey, mask = picture(1024, 1024, 12, number)
        Image.fromarray(grey).save(root / f"images/p{number}.png")
        Image.fromarray(mask).save(root / f"labels/p{number}.png")
    (root / "site.yml").write_text(_SITE)


def fedfms(*arguments: str | Path) -> tuple[float, int]:
    """Run a command; wall seconds, and the most bytes that it had resident."""
    started = time.monotonic()
    command = [sys.executable, "-c", _COMMAND, *map(str, arguments)]
    code = f"import resource, subprocess, sys; r = subprocess.run({command!r}).returncode; "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(r)"
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    return time.monotonic() - started, int(told.stdout.split()[-1]) * 1024


def judged(found: NDArray[np.bool_], truth: NDArray[np.uint8]) -> dict[str, Any]:
    """How many discs a mask meets, and how many of its regions meet none."""
    discs, count = ndimage.label(truth)
    regions, others = ndimage.label(found)
    met = len(set(np.unique(discs[found]).tolist()) - {0})
    true = len(set(np.unique(regions[truth > 0]).tolist()) - {0})
    both = int(np.count_nonzero(found & (truth > 0)))
    return {
        "discs": count,
        "found": met,
        "regions_elsewhere": others - true,
        "dice": round(2 * both / max(1, int(found.sum()) + int(truth.sum())), 3),
    }


def measure(height: int, width: int, rounds: int, work: Path) -> dict[str, Any]:
    """All figures."""
    write_site(work / "site")
    grey, mask = picture(height, width, 40, 1000)
    (work / "large").mkdir()
    Image.fromarray(grey).save(work / "large/one.png")
    del grey
    figures: dict[str, Any] = {"pixels": [height, width], "across": _ACROSS}
    for name, tile in (("in parts", "512"), ("as a whole", "null")):
        run = work / f"{name.replace(' ', '-')}/model.safetensors"
        run.parent.mkdir()
        settings = {
            "classes": "disc", "rounds": str(rounds), "local_epochs": "4", "tile": tile,
            "evaluate_first": str(rounds), "learning_rate": "1e-3",
        }  # fmt: skip
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        site = work / "site/site.yml"
        trained, _ = fedfms("train-local", "jobs/fedmsa", "--site", site, "--output", run, *sets)
        masks = work / f"masks {name}"
        seconds, memory = fedfms("predict", run, work / "large", masks, "--site", site)
        figures[name] = {
            **judged(np.asarray(Image.open(masks / "one.png")) == 1, mask),
            "seconds_of_training": round(trained),
            "seconds": round(seconds),
            "peak_bytes": memory,
        }
    return figures


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=int, nargs=2, default=(9000, 11000))
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    with tempfile.TemporaryDirectory() as work:
        figures = measure(*given.size, given.rounds, Path(work))
    print(json.dumps(figures, indent=2))
    parts = figures["in parts"]
    return int(parts["found"] < parts["discs"] or parts["peak_bytes"] > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
