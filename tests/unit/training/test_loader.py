"""Slices to batches: the same numbers whatever the way, by processes that end with this one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from little import disc_case, disc_dataset, little_case, little_recipe, little_site
from torch.utils.data import ConcatDataset, Subset, default_collate

from fedfms.contracts.site import Compute
from fedfms.data.slices import SliceDataset
from fedfms.geometry import (
    Frame,
    input_of,
    native_slice,
    network_input,
    pixel_statistics,
    resized_in_floats,
    resized_slice,
)
from fedfms.training import loader as module
from fedfms.training.loader import Loader, cpus_here, workers_here
from fedfms.training.loop import ShuffledBatches

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resize", ["pad", "stretch"])
def test_batches_are_what_the_datasets_own_items_are_round_after_round(resize, workers):
    recipe = little_recipe(resize=resize, batch_size=3)
    site = little_site(workers=workers)
    cases = [disc_case(0, 4, key="a"), disc_case(1, 3, size=50, key="b")]  # of two sizes
    wide = little_case(cases[0].images[:, :10], cases[0].labels[:, :10], key="c")
    dataset = SliceDataset([*cases, wide], site, recipe)
    loader = Loader(dataset, recipe, site, CPU)
    for number in range(3):
        order = ShuffledBatches(len(dataset), recipe, number)
        batches = zip(loader.batches(order), order, strict=True)
        for batch, items in batches:
            expected = default_collate([dataset[item] for item in items])
            assert batch.keys() == expected.keys()
            for key, values in expected.items():
                assert torch.equal(batch[key], values), (number, key)
                assert batch[key].dtype == torch.float32


def test_slices_of_several_sites_and_of_a_part_come_in_their_order():
    recipe, site = little_recipe(), little_site(workers=0)
    one, other = disc_dataset(recipe, site), disc_dataset(recipe, site, (2, 5))
    both = ConcatDataset([one, Subset(other, [6, 0, 3])])
    (batch,) = Loader(both, recipe, site, CPU).batches([[8, 0, 7, 9]])
    expected = torch.stack([both[item]["image"] for item in (8, 0, 7, 9)])
    assert torch.equal(batch["image"], expected)


@pytest.mark.parametrize("channels", ["gray", "rgb", "neighbours"])
@pytest.mark.parametrize("resize", ["pad", "stretch"])
@pytest.mark.parametrize("paper_compat", [False, True])
@pytest.mark.parametrize("size", [(24, 40), (90, 61), (32, 32)])
def test_what_a_gpu_makes_of_native_levels_is_one_level_away_at_most(
    channels, resize, paper_compat, size
):
    # the same operations on this processor; noise, on which rounding shows most
    recipe = little_recipe(resize=resize, paper_compat=paper_compat)
    site = little_site(channels=channels)
    shape = (3, *size, 3) if channels == "rgb" else (3, *size)
    images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    case = little_case(images, np.ones((3, *size)), (1.0, 1.3, 0.7))
    rows, columns = Frame.of(case).input_size(recipe)
    levels = resized_slice(case, 1, site, recipe)
    native = native_slice(case, 1, site)
    floats = resized_in_floats(native, rows, columns, not paper_compat)
    apart = (levels.int() - floats.int()).abs()
    assert apart.max() <= 1
    got = input_of([floats], [(rows, columns)], recipe, CPU)[0]
    expected = network_input(case, 1, site, recipe)
    level = 1 / torch.tensor(pixel_statistics(recipe)[1])[:, None, None]
    assert ((got - expected).abs() <= 1.001 * level).all()
    assert torch.equal(got[:, rows:], expected[:, rows:])


def test_a_batch_of_native_levels_has_the_targets_of_the_resized_one():
    recipe, site = little_recipe(), little_site(workers=0)
    dataset = disc_dataset(recipe, site)
    for _ in range(2):  # the second time they are kept
        for item in range(len(dataset)):
            picture, covered, target, annotated = dataset.levels(item, native=True)
            resized = dataset.levels(item)
            assert picture.shape == (1, 24, 24)
            assert covered == resized[1] == (32, 32)
            assert torch.equal(target, resized[2])
            assert torch.equal(annotated, resized[3])


# ------------------------------------------------------------------------------ worker processes


def test_workers_stay_for_all_rounds_and_end_with_their_loader():
    recipe, site = little_recipe(), little_site(workers=2)
    dataset = disc_dataset(recipe, site)
    loader = Loader(dataset, recipe, site, CPU)
    me, seen = psutil.Process(), []
    others = {child.pid for child in me.children()}
    for number in range(3):
        assert sum(len(b["image"]) for b in loader.batches(ShuffledBatches(7, recipe, number))) == 7
        seen.append({child.pid for child in me.children()} - others)
    assert len(seen[0]) >= 2
    assert seen[0] == seen[1] == seen[2]
    del loader
    deadline = time.monotonic() + 10
    while {child.pid for child in me.children()} & seen[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_round_that_ended_in_its_middle_leaves_nothing_to_the_next():
    recipe, site = little_recipe(), little_site(workers=2)
    dataset = disc_dataset(recipe, site)
    loader = Loader(dataset, recipe, site, CPU)
    half = loader.batches(ShuffledBatches(7, recipe, 0))
    next(half)
    del half
    order = ShuffledBatches(7, recipe, 1)
    for batch, items in zip(loader.batches(order), order, strict=True):
        assert torch.equal(batch["image"], default_collate([dataset[i] for i in items])["image"])


def test_a_loader_leaves_the_random_numbers_of_the_process_alone():
    recipe, site = little_recipe(), little_site(workers=1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(Loader(disc_dataset(recipe, site), recipe, site, CPU).batches([[0, 1]]))
    assert torch.equal(torch.rand(2), expected)


def test_workers_do_not_outlive_a_process_that_is_killed():
    program = """
        import sys, time, torch
        sys.path.insert(0, sys.argv[1])
        from little import disc_dataset, little_recipe, little_site
        from fedfms.training.loader import Loader
        recipe, site = little_recipe(), little_site(workers=2)
        loader = Loader(disc_dataset(recipe, site), recipe, site, torch.device("cpu"))
        batches = loader.batches([[0, 1], [2, 3], [4, 5]])
        next(batches)
        print("begun", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"begun\n"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=1)  # torch's own watch looks every 5 seconds
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("text", "affinity", "expected"),
    [("max 100000", 8, 8), ("250000 100000", 8, 2), ("50000 100000", 8, 1), ("", 3, 3)],
)
def test_a_container_has_the_cpus_of_its_quota(monkeypatch, tmp_path, text, affinity, expected):
    quota = tmp_path / "cpu.max"
    if text:
        quota.write_text(f"{text}\n")
    monkeypatch.setattr(module, "_QUOTA", quota)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(affinity)))
    assert cpus_here() == expected


def test_a_gpu_has_workers_beside_the_cpu_that_feeds_it(monkeypatch):
    monkeypatch.setattr(module, "cpus_here", lambda: 3)
    assert workers_here(CPU) == 0
    assert workers_here(torch.device("cuda", 0)) == 2
    monkeypatch.setattr(module, "cpus_here", lambda: 64)
    monkeypatch.setattr(module, "_shared_memory", lambda: 10 * 2**30)
    assert workers_here(torch.device("cuda", 0)) == 4
    monkeypatch.setattr(module, "_shared_memory", lambda: 64 * 2**20)  # what a container is given
    assert workers_here(torch.device("cuda", 0)) == 0
    assert Compute().workers is None
