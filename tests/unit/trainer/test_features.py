"""What the frozen part of an encoder made of slices, kept at the site: the same round, sooner."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.features import FeatureFolder, case_name, slice_name
from fedfms.data.manifest import find_cases
from fedfms.data.memory import FEATURES_FOLDER
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.models.build import SamSegmenter, build_model
from fedfms.models.travelling import read_travelling
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import TaskRunner
from fedfms.training.frozen import space_of
from fedfms.training.loop import train_round
from fedfms.training.pooled import train_pooled
from small_disk import small_disk


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few(recipe: Recipe) -> Recipe:
    """Adapters in the last two blocks of four, scored before the second round and at the end."""
    return dataclasses.replace(recipe, adapter_blocks="last:2", rounds=4, evaluate_every=1)


@pytest.fixture
def own(place: Place) -> Place:
    """A site whose files are its own, to be taken away."""
    for name in ("images", "labels"):
        folder = (place.data / name).resolve()
        (place.data / name).unlink()
        shutil.copytree(folder, place.data / name)
    return place


def start_of(recipe: Recipe, checkpoints: Path) -> dict[str, Tensor]:
    """A model that has been trained a little: all adapters do something."""
    generator = torch.Generator().manual_seed(23)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in read_travelling(
            build_model(recipe, checkpoints / "random.safetensors")
        ).items()
    }


def train(
    trainer: TaskRunner, recipe: Recipe, number: int, sent: Mapping[str, Tensor], job: str = "job"
) -> Outcome:
    model = {name: tensor + 0.001 * number for name, tensor in sent.items()}
    task = Task(kind="train", site=SITE, job=job, round=number, model="round", recipe=recipe)
    return trainer.run(task, lambda: model, Control())


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one.tensors.keys() == other.tensors.keys() and one.tensors
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    assert one.contribution.metrics == other.contribution.metrics
    assert one.contribution.loss == other.contribution.loss


def differ(one: Outcome, other: Outcome) -> bool:
    """Of the tensors: a loss is told in few digits."""
    return any(not torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def files(work: Path) -> list[Path]:
    return sorted((work / FEATURES_FOLDER).rglob("*.features"))


def without_backbone(trainer: TaskRunner) -> None:
    """Have the network's first layer give nothing but NaN: who runs it is found out."""
    assert trainer._job is not None and isinstance(trainer._job.model, SamSegmenter)
    with torch.no_grad():
        trainer._job.model.image_encoder.patch_embed.proj.weight.fill_(float("nan"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("last", ["last:0", "last:2"])
def test_rounds_with_all_some_or_no_features_kept_are_equal_to_the_bit(
    place: Place, few: Recipe, checkpoints: Path, tmp_path: Path, last, precision, workers
) -> None:
    recipe = dataclasses.replace(few, adapter_blocks=last, precision=precision)
    sent = start_of(recipe, checkpoints)
    place.set_site(min_cases=1, threads=1, features_gib=0, workers=0)
    never = task_runner(place, tmp_path / "never")
    expected = [train(never, recipe, number, sent) for number in range(3)]
    assert not (tmp_path / "never" / FEATURES_FOLDER).exists()

    place.set_site(min_cases=1, threads=1, features_gib=1, workers=workers)
    work = tmp_path / "kept"
    assert_same(train(task_runner(place, work), recipe, 0, sent), expected[0])  # none
    assert len(files(work)) == 16  # 8 cases of 2 slices, those to train on and those to score
    assert_same(train(task_runner(place, work), recipe, 1, sent), expected[1])  # all
    for path in files(work)[::3]:
        path.unlink()
    # some, in a trainer that took the place of one that was killed
    assert_same(train(task_runner(place, work), recipe, 2, sent), expected[2])
    assert len(files(work)) == 16


@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_slices_have_so_many_variants_kept_and_are_equal_to_the_bit(
    place: Place, few: Recipe, checkpoints: Path, tmp_path: Path, workers
) -> None:
    recipe = dataclasses.replace(
        few,
        augment=True,
        augment_flips="horizontal",
        augment_rotation=30.0,
        augment_inversion=0.5,
        augment_gamma=2.0,
        augment_variants=2,
    )
    sent = start_of(recipe, checkpoints)
    place.set_site(min_cases=1, threads=1, features_gib=0, workers=0)
    never = task_runner(place, tmp_path / "never")
    expected = [train(never, recipe, number, sent) for number in range(3)]

    place.set_site(min_cases=1, threads=1, features_gib=1, workers=workers)
    work = tmp_path / "kept"
    assert_same(train(task_runner(place, work), recipe, 0, sent), expected[0])  # none
    to_train = len(files(work)) - len([path for path in files(work) if "-" not in path.stem])
    first = len(files(work))
    assert 0 < to_train < first  # what is scored is kept as it is
    trainer = task_runner(place, work)
    assert_same(train(trainer, recipe, 1, sent), expected[1])
    assert len(files(work)) == first + to_train  # the second variant
    for path in files(work)[::3]:
        path.unlink()
    assert_same(train(task_runner(place, work), recipe, 2, sent), expected[2])  # the first again
    plain = task_runner(place, tmp_path / "plain")
    as_they_are = train(plain, few, 0, sent)
    assert differ(as_they_are, expected[0])
    assert as_they_are.contribution.metrics == expected[0].contribution.metrics  # scored before


def test_from_the_second_time_on_the_frozen_part_is_not_run(
    place: Place, few: Recipe, checkpoints: Path
) -> None:
    sent = start_of(few, checkpoints)
    trainer = task_runner(place)
    train(trainer, few, 0, sent)
    without_backbone(trainer)
    result = train(trainer, few, 1, sent)  # scores and steps alike, or it would not be finite
    assert result.contribution.loss is not None and result.contribution.metrics


def test_what_is_kept_is_for_this_user_only(place: Place, few: Recipe, checkpoints: Path) -> None:
    old = os.umask(0)
    try:
        train(task_runner(place), few, 0, start_of(few, checkpoints))
    finally:
        os.umask(old)
    kept = place.work / FEATURES_FOLDER
    for path in (kept, *kept.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_bit_else(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nonsense(path: Path) -> None:
    path.write_text("FEDFMSF1 and more")


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", [cut_off, one_bit_else, empty, nonsense, link])
def test_damaged_features_are_computed_anew(
    place: Place, few: Recipe, checkpoints: Path, damage: Callable[[Path], None]
) -> None:
    sent = start_of(few, checkpoints)
    first = train(task_runner(place), few, 0, sent)
    whole = {path: path.read_bytes() for path in files(place.work)}
    for path in whole:
        damage(path)
    half = next(iter(whole)).with_name("tmpabc.part")  # of a process that was killed
    half.write_bytes(b"FEDFMSF1")
    shutil.rmtree(place.work / "runs")  # the answer, which would be given again
    assert_same(train(task_runner(place), few, 0, sent), first)
    assert {path: path.read_bytes() for path in files(place.work)} == whole
    assert not half.exists()


def test_features_go_with_the_last_job_that_used_them(
    place: Place, few: Recipe, checkpoints: Path
) -> None:
    sent = start_of(few, checkpoints)
    trainer = task_runner(place)
    train(trainer, few, 0, sent, job="one")
    without_backbone(trainer)
    slower = dataclasses.replace(few, learning_rate=1e-4)
    train(trainer, slower, 0, sent, job="two")  # of the same network: nothing is added
    assert len(files(place.work)) == 16
    trainer.forget("one")
    assert len(files(place.work)) == 16
    trainer.forget("two")
    assert not list((place.work / FEATURES_FOLDER).iterdir())
    trainer.forget("never seen")


@pytest.mark.parametrize("restarted", [False, True])
def test_the_features_of_a_patient_who_withdraws_are_removed(
    own: Place, few: Recipe, checkpoints: Path, restarted: bool
) -> None:
    sent = start_of(few, checkpoints)
    trainer = task_runner(own)
    train(trainer, few, 0, sent)
    before = {path.parent.name for path in files(own.work)}
    site = SiteConfig.from_yaml(own.data / "site.yml")
    gone = next(case for case in find_cases(site) if case.split == "train")
    (name,) = {case_name(case, site) for case in prepare_cases([gone], site, folder=own.work / "p")}
    for path in (gone.image, gone.label):
        path.unlink()
    if restarted:
        trainer = task_runner(own)
    train(trainer, few, 1, sent)
    assert {path.parent.name for path in files(own.work)} == before - {name}


def test_a_full_disk_costs_no_round(
    place: Place, few: Recipe, checkpoints: Path, tmp_path: Path
) -> None:
    sent = start_of(few, checkpoints)
    expected = [train(task_runner(place), few, 0, sent), train(task_runner(place), few, 1, sent)]
    with small_disk(tmp_path / "disk", "40m") as disk:
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.tell() < 38 << 20:  # 5 % are left
                file.write(b"\0" * 4096)
        assert_same(train(task_runner(place, disk), few, 0, sent), expected[0])
        assert not files(disk) and not list(disk.rglob("*.part"))
        (disk / "filler").unlink()
        assert_same(train(task_runner(place, disk), few, 1, sent), expected[1])
        assert len(files(disk)) == 16, "and goes on with it where there is room again"


def test_to_make_room_the_least_recently_used_of_other_networks_goes(tmp_path: Path) -> None:
    one = torch.arange(256, dtype=torch.float32)
    size = 1024 + 128  # in a file
    first = FeatureFolder(tmp_path, "1" * 64, "a", 4 * size)
    for name in ("x/0", "x/1", "x/2"):
        first.put(name, one)
    for age, name in enumerate(("x/1", "x/0", "x/2")):
        os.utime(tmp_path / ("1" * 64) / f"{name}.features", (1e9 + age, 1e9 + age))
    assert first.get("x/1") is not None  # and so it was used last
    second = FeatureFolder(tmp_path, "2" * 64, "b", 4 * size)
    second.put("y/0", one)
    second.put("y/1", one)
    assert [first.get(f"x/{i}") is not None for i in range(3)] == [False, True, True]
    for i in range(2, 6):
        second.put(f"y/{i}", one + i)
    assert [first.get(f"x/{i}") is not None for i in range(3)] == [False] * 3
    # what the job uses itself stays, and what has no room is not kept
    kept = [second.get(f"y/{i}") for i in range(6)]
    assert [found is not None for found in kept] == [True] * 4 + [False] * 2
    assert kept[3] is not None and torch.equal(kept[3], one + 3)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.features")) <= 4 * size


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone_sha256": "1" * 64},
        {"image_size": 72},
        {"resize": "stretch"},
        {"normalize": False},
        {"precision": "bf16"},
        {"adapter_blocks": "last:1"},
        {"adapter_blocks": "last:0"},
    ],
)
def test_other_numbers_lie_elsewhere(few: Recipe, changes: dict[str, object]) -> None:
    def space(recipe: Recipe) -> str:
        return space_of(build_model(recipe, None), torch.device("cpu"))

    base = space(few)
    assert space(dataclasses.replace(few, **changes)) != base
    same = {"rounds": 9, "learning_rate": 1e-5, "classes": ("a", "b"), "seed": 3, "batch_size": 1}
    assert space(dataclasses.replace(few, **same)) == base
    torch.set_num_threads(2)
    assert space(few) != base


def test_other_pictures_have_other_names(place: Place, tmp_path: Path) -> None:
    site = SiteConfig.from_yaml(place.data / "site.yml")
    brighter = dataclasses.replace(
        site, intensity=dataclasses.replace(site.intensity, low=2.0, high=80.0)
    )
    beside = dataclasses.replace(site, channels="neighbours")
    names = []
    for setting in (site, brighter, beside):
        for case in prepare_cases(find_cases(setting), setting, folder=tmp_path):
            names += [slice_name(case, index, setting) for index in range(len(case.images))]
    assert None not in names and len(set(names)) == len(names) == 3 * 16


def test_steps_of_patients_are_the_same_with_and_without(
    place: Place, few: Recipe, checkpoints: Path, tmp_path: Path
) -> None:
    """All patients in each step and no noise, which would be another each time."""
    recipe = dataclasses.replace(
        few, patient_rate=1.0, patient_clip_norm=0.5, classes=few.classes, local_epochs=2
    )
    site = SiteConfig.from_yaml(place.data / "site.yml")
    cases = prepare_cases(find_cases(site), site, folder=tmp_path / "prepared")
    dataset = SliceDataset([case for case in cases if case.case.split == "train"], site, recipe)
    results = []
    for keeps in (False, True, True):
        model = build_model(recipe, checkpoints / "random.safetensors")
        space = space_of(model, torch.device("cpu"))
        kept = FeatureFolder(tmp_path / "features", space, "job", 1 << 30) if keeps else None
        train_round(
            model,
            dataset,
            recipe,
            site,
            round_number=0,
            optimizer=None,
            control=Control(),
            features=kept,
        )
        results.append(read_travelling(model))
    assert len(list((tmp_path / "features").rglob("*.features"))) == len(dataset)
    start = read_travelling(build_model(recipe, checkpoints / "random.safetensors"))
    assert any(not torch.equal(start[name], tensor) for name, tensor in results[0].items())
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def test_a_canary_keeps_no_features(place: Place, few: Recipe, checkpoints: Path) -> None:
    canary = dataclasses.replace(few, canary=True, local_epochs=2)
    outcome = train(task_runner(place), canary, 0, start_of(canary, checkpoints))
    assert outcome.contribution.rehearsal is not None
    assert not list((place.work / FEATURES_FOLDER).iterdir())


def test_training_alone_computes_the_frozen_part_once_and_leaves_nothing(
    place: Place, few: Recipe, checkpoints: Path, tmp_path: Path
) -> None:
    """At one site and on two together: the same model as where nothing is kept."""
    recipe = dataclasses.replace(few, rounds=2)
    trained = []
    for gib in (0, 1):
        place.set_site(min_cases=1, threads=1, features_gib=gib)
        site = SiteConfig.from_yaml(place.data / "site.yml")
        beside = dataclasses.replace(site, channels="neighbours")
        seen: list[int] = []

        def look(_: object, seen: list[int] = seen) -> None:
            seen.append(len(files(tmp_path)))

        trained.append(
            train_pooled(
                recipe,
                {"one": site, "two": beside},
                checkpoints=checkpoints,
                control=Control(),
                on_round=look,
                folder=tmp_path / "prepared",
            )
        )
        # what is scored before training, and then all slices of both, whatever the rounds
        assert seen == ([0, 0, 0] if gib == 0 else [seen[0], 32, 32]) and seen[0] < 32
        assert not files(tmp_path)
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name
