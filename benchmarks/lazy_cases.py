"""Many large volumes at one site: memory of training and of check-data, and slices a second.

    python benchmarks/lazy_cases.py          200 volumes of 256 x 256 x 120, some minutes
    python benchmarks/lazy_cases.py --cases 8 --size 64 64 24

Makes the volumes in a temporary folder (some 5 GB with the cache, removed at the end) and prints
one JSON object. Memory is RssAnon + RssShmem of a command and its worker processes together, the
most that was seen, and how much that is above the same command on a site of two volumes. Speed is
that of the second epoch with two workers against reading the .nii.gz for each slice, and against
reading it once for all slices of a volume.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import torch
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader, Dataset

from fedfms.contracts.recipe import Recipe, read_job_recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.content import read_bytes
from fedfms.data.formats import read_image, read_label
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.prepared import PreparedCase, combine
from fedfms.data.slices import SliceDataset
from fedfms.shipped import find_shipped

LIMIT_BYTES = 1.5e9  # of anonymous and shared memory, above the model
TIMES_FASTER = 3.0
_KINDS = 5  # volumes that are made; the others differ from one of them in their first slice
_SETTINGS = ("--set", "rounds=2", "--set", "local_epochs=1", "--set", "evaluate_first=2")
_COMMAND = "import sys; from fedfms.cli import main; sys.exit(main())"


def write_volumes(root: Path, cases: int, size: Sequence[int], validation: float = 0.05) -> Path:
    """A site of int16 .nii.gz volumes, each of another content; its site.yml.

    A gzip file may be several that follow each other: the header, the first slice, which is each
    volume's own, and the rest, which is compressed once for each kind.
    """
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for kind in range(min(_KINDS, cases)):
        random = np.random.default_rng(kind)
        smooth = gaussian_filter(random.normal(0, 1, size), 3)
        values = np.asarray(400 + 3000 * smooth + random.integers(0, 8, size), np.int16)
        label = np.zeros(size, np.uint8)
        middle = (
            *(slice(side * 3 // 8, side * 5 // 8) for side in size[:2]),
            slice(size[2] // 2 - 3, size[2] // 2 + 3),
        )
        label[middle] = 1
        values[middle] += 300
        for number in range(kind, cases, _KINDS):
            bits = np.array([number >> place & 1 for place in range(10)])
            values[0, :10, 0] = np.where(bits == 1, 2000, -2000)  # white or black by any rule
            name = f"volume-{number:03d}.nii.gz"
            if number == kind:
                head, rest = _pieces(values)
                drawn = gzip.compress(nibabel.Nifti1Image(label, np.eye(4)).to_bytes(), 1)
            first = gzip.compress(values[:, :, 0].tobytes(order="F"), 1)
            (root / "images" / name).write_bytes(head + first + rest)
            (root / "labels" / name).write_bytes(drawn)
    text = (
        f"data_root: .\nformat: nifti\nimages: images/*.nii.gz\nlabels: labels/*.nii.gz\n"
        f"classes:\n  lesion: [1]\nvalidation_fraction: {validation}\n"
        "threads: 1\nworkers: 2\nmicro_batch: 4\ncache: cache\n"
    )
    (root / "site.yml").write_text(f"{text}keep_empty_every: 0\n", encoding="utf-8")
    (root / "all-slices.yml").write_text(text, encoding="utf-8")
    return root / "site.yml"


def _pieces(values: np.ndarray) -> tuple[bytes, bytes]:
    """A volume's header, and its voxels behind the first slice, each compressed."""
    data = nibabel.Nifti1Image(values, np.eye(4)).to_bytes()
    start = len(data) - values.nbytes
    behind = start + values[:, :, 0].nbytes
    return gzip.compress(data[:start], 1), gzip.compress(data[behind:], 1)


def peak_of(arguments: Sequence[str]) -> tuple[int, float]:
    """Run a fedfms command; the most RssAnon + RssShmem of it and its children, and its seconds.

    Raises:
        RuntimeError: the command failed.
    """
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments], stdout=said, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                tree = [process.pid, *(c.pid for c in psutil.Process(process.pid).children(True))]
                peak = max(peak, sum(map(anonymous_bytes, tree)))
            time.sleep(0.05)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(said.read().decode(errors="replace"))
    return peak, time.monotonic() - started


def anonymous_bytes(process: int) -> int:
    """RssAnon and RssShmem of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem"))
    )


class FromFiles(Dataset[dict[str, torch.Tensor]]):
    """What `SliceDataset` gives, with the case's files read for each slice."""

    def __init__(self, data: SliceDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        number, index = self.data.slices[item]
        return self.slices_of(number, [index])[0]

    def slices_of(self, number: int, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Some slices of one case, whose files are read once."""
        site, case = self.data.site, self.data.prepared[number].case
        image = read_image(case.image, read_bytes(case.image, site), site)
        label = read_label(case.label, read_bytes(case.label, site), site, image)
        whole = combine(case, image, label, site)
        cut = [
            PreparedCase(
                case, whole.images[i : i + 1], whole.labels[i : i + 1], whole.spacing, True
            )
            for i in indices
        ]
        return [SliceDataset([one], site, self.data.recipe)[0] for one in cut]


def slices_a_second(site: SiteConfig, recipe: Recipe, read_from_files: int) -> dict[str, float]:
    """Slices a second with two workers, from the cache in the second epoch and from the files."""
    torch.set_num_threads(1)
    cases = [case for case in prepare_cases(find_cases(site), site) if case.case.split == "train"]
    data = SliceDataset(cases[:16], site, recipe)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()

    def rate(dataset: Dataset[dict[str, torch.Tensor]], items: list[int]) -> float:
        loader = DataLoader(dataset, batch_size=4, sampler=items, num_workers=2)
        started = time.monotonic()
        for _ in loader:
            pass
        return len(items) / (time.monotonic() - started)

    first = rate(data, order)
    second = rate(data, order)
    from_files = FromFiles(data)
    each = rate(from_files, order[:read_from_files])
    indices = [index for number, index in data.slices if number == 0]
    started = time.monotonic()
    from_files.slices_of(0, indices)
    once = 2 * len(indices) / (time.monotonic() - started)  # of two workers that wait for nothing
    return {
        "first_epoch": first,
        "second_epoch": second,
        "file_for_each_slice": each,
        "file_once_a_volume": once,
        "times_faster": second / each,
    }


def measure(
    root: Path, cases: int, size: Sequence[int], image_sizes: Sequence[int], read: int
) -> dict[str, Any]:
    """All figures of one site of so many volumes."""
    started = time.monotonic()
    few = write_volumes(root / "few", 2, size, 0.5)
    many = write_volumes(root / "many", cases, size)
    figures: dict[str, Any] = {"cases": cases, "size": list(size)}
    figures["seconds_to_write"] = time.monotonic() - started
    for name, command in (
        ("train_local", ["train-local", "fedmsa", *_SETTINGS, "--site"]),
        ("check_data", ["check-data"]),
    ):
        base, _ = peak_of([*command, str(few)])
        peak, seconds = peak_of([*command, str(many)])
        figures[name] = {"peak_bytes": peak, "above_two_volumes": peak - base, "seconds": seconds}
    cache = root / "many" / "cache"
    figures["cache_bytes"] = sum(path.stat().st_size for path in cache.iterdir())
    recipe = read_job_recipe(find_shipped("fedmsa"))
    site = SiteConfig.from_yaml(many.with_name("all-slices.yml"))
    for side in image_sizes:
        asked = recipe.with_overrides([f"image_size={side}"])
        figures[f"slices_a_second_{side}"] = slices_a_second(site, asked, read)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--size", type=int, nargs=3, default=[256, 256, 120])
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--folder", type=Path, help="on which disk; the temporary one")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        figures = measure(Path(root), given.cases, given.size, given.image_sizes, 40)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    kept = all(
        figures[name]["above_two_volumes"] < LIMIT_BYTES for name in ("train_local", "check_data")
    )
    rates = [figures[f"slices_a_second_{side}"]["times_faster"] for side in given.image_sizes]
    return 0 if kept and min(rates) >= TIMES_FASTER else 1


if __name__ == "__main__":
    sys.exit(main())
