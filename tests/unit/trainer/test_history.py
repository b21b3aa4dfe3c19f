"""What a site counts over its whole history, and which means leave of which patients."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import stat
import statistics
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor
from trainer_process import SITE, Place, ask, task_runner

from fedfms.contracts.contribution import Metric
from fedfms.contracts.recipe import Recipe
from fedfms.errors import DoorClosed
from fedfms.exchange.tensors import update_norm
from fedfms.local.synthetic import write_phantom_site
from fedfms.models.build import build_model
from fedfms.models.travelling import read_travelling
from fedfms.trainer.history import HISTORY_FILE, SKETCH, History, sketch
from fedfms.trainer.secret import SECRET_FILE, site_secret
from fedfms.trainer.tasks import TaskRunner
from small_disk import small_disk

SECRET = b"s" * 32


@pytest.fixture
def quick(recipe: Recipe) -> Recipe:
    """Without scores in its rounds."""
    return dataclasses.replace(recipe, evaluate_first=recipe.rounds, optimizer_state="reset")


def moved(model: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: tensor + by for name, tensor in model.items()}


def refused(code: str, *args: object, **more: object) -> DoorClosed:
    with pytest.raises(DoorClosed) as caught:
        ask(*args, **more)  # type: ignore[arg-type]
    assert caught.value.code == code
    return caught.value


# ----------------------------------------------------------------------------------- models


def test_a_sketch_tells_how_far_apart_two_models_are() -> None:
    generator = torch.Generator().manual_seed(2)
    model = {
        "b": torch.randn(700, 300, generator=generator),
        "a": torch.randn(5001, generator=generator).half(),
    }
    ratios = []
    for number in range(40):  # one value of many, a few, all: whatever moved
        key = f"{number:032d}".encode()
        change = torch.randn(700, 300, generator=generator) * 1e-4
        if number % 2:
            change[10:] = 0
        other = {**model, "b": model["b"] + change}
        true = float((other["b"].double() - model["b"].double()).norm())
        ratios.append(np.linalg.norm(sketch(model, key) - sketch(other, key)) / true)
    squared = [ratio**2 for ratio in ratios]
    assert statistics.mean(squared) == pytest.approx(1, abs=4 * (2 / SKETCH / 40) ** 0.5)
    assert min(ratios) > 0.5 and max(ratios) < 1.6
    assert not np.allclose(sketch(model, SECRET), sketch(model, b"t" * 32))


def test_the_same_model_is_trained_on_once_and_a_real_average_is_another(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    trainer = task_runner(place)
    first = ask(trainer, quick, 0, global_model)
    norm = first.contribution.update_norm
    assert norm is not None
    error = refused("same-model", trainer, quick, 1, global_model)
    assert "round 1 is that of round 0" in error.problem
    noise = torch.Generator().manual_seed(1)
    near = {  # what a server could add that no average is
        name: t + 1e-6 * torch.randn(t.shape, generator=noise) for name, t in global_model.items()
    }
    refused("same-model", trainer, quick, 1, near)
    refused("same-model", task_runner(place), quick, 1, global_model)  # a new process
    trainer.forget("job")
    refused("same-model", trainer, quick, 1, global_model, job="other")
    # its own difference in the average of a hundred sites that have nothing in common with it
    average = {name: t + 0.01 * first.tensors[name] for name, t in global_model.items()}
    assert ask(trainer, quick, 1, average).tensors


def test_what_is_asked_again_as_it_was_is_answered_as_it_was_and_counts_once(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(min_cases=1, max_total_rounds=2)
    trainer = task_runner(place)
    first = ask(trainer, quick, 0, global_model)
    for again in (trainer, task_runner(place)):  # a server that died asks so, a new job too
        for job in ("job", "another"):
            second = ask(again, quick, 0, global_model, job=job)
            assert all(torch.equal(first.tensors[name], t) for name, t in second.tensors.items())
    ask(trainer, quick, 1, moved(global_model, 0.01))
    error = refused("rounds-used-up", trainer, quick, 2, moved(global_model, 0.02))
    assert "at most 2 rounds in all (max_total_rounds)" in error.problem
    ask(trainer, quick, 1, moved(global_model, 0.01))
    other = dataclasses.replace(quick, seed=12)
    refused("rounds-used-up", task_runner(place), other, 0, global_model, job="new")


def test_a_round_that_failed_may_be_tried_under_another_number(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    trainer = task_runner(place)
    diverges = {name: torch.full_like(tensor, 1e30) for name, tensor in global_model.items()}
    with pytest.raises(Exception, match=r"became nan|finite"):
        ask(trainer, quick, 0, diverges)
    place.set_policy(min_cases=1, min_steps=10_000)
    refused("too-few-steps", trainer, quick, 0, global_model)
    place.set_policy(min_cases=1)
    assert ask(trainer, quick, 1, global_model).tensors


def test_one_model_is_trained_on_by_so_many_recipes(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(min_cases=1, max_asks_of_a_model=2)
    trainer = task_runner(place)
    recipes = [dataclasses.replace(quick, seed=seed) for seed in range(3)]
    for recipe in recipes[:2]:
        ask(trainer, recipe, 0, global_model, job=f"job-{recipe.seed}")
    error = refused("asked-too-often", trainer, recipes[2], 0, global_model, job="third")
    assert "max_asks_of_a_model" in error.problem
    assert ask(trainer, recipes[2], 0, moved(global_model, 0.01), job="third").tensors


def real_files(place: Place) -> None:
    """Of its own, in the place of links to those of all."""
    for name in ("images", "labels"):
        shared = (place.data / name).resolve()
        (place.data / name).unlink()
        shutil.copytree(shared, place.data / name)


def test_the_same_question_on_other_data_is_another(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    """Else a patient who joins would show in as many differences as one asks for."""
    real_files(place)
    label = place.data / "labels" / "phantom-001.nii.gz"
    other = place.data / "labels" / "phantom-002.nii.gz"
    before, after = label.read_bytes(), other.read_bytes()
    place.set_policy(min_cases=1, max_asks_of_a_model=2)
    first = ask(task_runner(place), quick, 0, global_model, job="a").tensors
    label.write_bytes(after)
    second = ask(task_runner(place), quick, 0, global_model, job="b").tensors
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert History(place.work, site_secret(place.work)).counts == (2, 0)
    for job, content, answer in (("c", before, first), ("d", after, second)):  # as they came
        label.write_bytes(content)
        again = ask(task_runner(place), quick, 0, global_model, job=job).tensors
        assert all(torch.equal(answer[name], again[name]) for name in answer)
    other.write_bytes(before)
    refused("asked-too-often", task_runner(place), quick, 0, global_model, job="e")
    place.set_policy(min_cases=1, max_total_rounds=2)
    refused("rounds-used-up", task_runner(place), quick, 0, global_model, job="e")
    place.set_policy(min_cases=1, max_asks_of_a_model=2)  # as it was when that answer was kept
    kept = ask(task_runner(place), quick, 0, global_model, job="d").tensors
    assert all(torch.equal(second[name], kept[name]) for name in second)


def test_the_same_question_with_other_moments_is_another(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    """A round may be asked for without the one before it: its optimizer then begins anew."""
    place.set_policy(min_cases=1, max_total_rounds=3)
    keeps = dataclasses.replace(quick, optimizer_state="keep")
    later = moved(global_model, 0.01)
    trainer = task_runner(place)
    ask(trainer, keeps, 0, global_model, job="a")
    first = ask(trainer, keeps, 1, later, job="a").tensors
    for number, model in enumerate((global_model, later)):  # a run that is submitted again
        again = ask(task_runner(place), keeps, number, model, job="b").tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = ask(task_runner(place), keeps, 1, later, job="c").tensors
    assert any(not torch.equal(first[name], other[name]) for name in first)
    refused("rounds-used-up", task_runner(place), keeps, 2, moved(global_model, 0.02), job="d")


def test_evaluations_are_counted_wherever_they_come_from(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(min_cases=1, max_total_evaluations=2)
    trainer = task_runner(place)
    ask(trainer, recipe, 0, global_model)  # a round that scores
    final = {"kind": "evaluate", "which": "final"}
    ask(trainer, recipe, 3, moved(global_model, 0.01), **final)
    ask(trainer, recipe, 3, moved(global_model, 0.01), job="again", **final)
    error = refused("evaluations-used-up", trainer, recipe, 3, moved(global_model, 0.02), **final)
    assert "at most 2 evaluations in all (max_total_evaluations)" in error.problem
    unscored = dataclasses.replace(recipe, evaluate_first=recipe.rounds)
    assert ask(trainer, unscored, 1, moved(global_model, 0.02)).tensors


def test_noise_is_not_drawn_twice_for_one_difference(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(min_cases=1, clip_norm=1.0, noise_std=0.1)
    trainer = task_runner(place)
    first = ask(trainer, quick, 0, global_model)
    second = ask(trainer, quick, 0, global_model)
    assert all(torch.equal(first.tensors[name], t) for name, t in second.tensors.items())
    refused("answered-before", trainer, quick, 0, global_model, job="other")
    trainer.forget("job")
    refused("answered-before", trainer, quick, 0, global_model)


# ------------------------------------------------------------------------------------- files


def test_it_outlives_a_power_cut_and_is_never_passed_over(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    ask(task_runner(place), quick, 0, global_model)
    path = place.work / HISTORY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((place.work / SECRET_FILE).stat().st_mode) == 0o600
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "asked", "ke')
    refused("same-model", task_runner(place), quick, 1, global_model)
    assert path.read_bytes() == whole
    path.write_bytes(b"\0" * 20 + b"\n" + whole)
    refused("no-history", task_runner(place), quick, 1, moved(global_model, 1e-2))
    path.write_bytes(whole)
    (place.work / SECRET_FILE).write_bytes(b"short")
    refused("no-secret", task_runner(place), quick, 1, moved(global_model, 1e-2))


def test_no_name_of_a_patient_stands_in_it(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor], phantoms: Path
) -> None:
    place.set_policy(min_cases=2)
    ask(task_runner(place), recipe, 0, global_model)
    text = (place.work / HISTORY_FILE).read_text()
    assert any(json.loads(line)["event"] == "told" for line in text.splitlines())
    assert "phantom" not in text
    named = History(place.work, SECRET).name("phantom-001")
    assert named != History(place.work, b"t" * 32).name("phantom-001")


def test_the_order_of_slices_follows_from_the_secret(
    place: Place, quick: Recipe, global_model: dict[str, Tensor], tmp_path: Path
) -> None:
    def difference(work: str, from_seed: bool = False) -> dict[str, Tensor]:
        trainer = task_runner(place, tmp_path / work)
        trainer.folders = dataclasses.replace(trainer.folders, order_from_seed=from_seed)
        return ask(trainer, quick, 0, global_model).tensors

    def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    first = difference("one")
    assert site_secret(tmp_path / "one") == (tmp_path / "one" / SECRET_FILE).read_bytes()
    (tmp_path / "same").mkdir()
    shutil.copy(tmp_path / "one" / SECRET_FILE, tmp_path / "same")
    assert equal(first, difference("same"))  # equal secret and seed: equal bytes
    assert not equal(first, difference("other"))
    assert not equal(first, difference("seed", from_seed=True))
    assert equal(difference("seed-a", from_seed=True), difference("seed-b", from_seed=True))


def test_another_recipe_has_another_order_whatever_differs_in_it(
    place: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    """Of two sums, one with a site more, equal parts of the others would show what it sent."""
    trainer = task_runner(place)
    trainer.folders = dataclasses.replace(trainer.folders, order_from_seed=False)
    differences = [
        ask(trainer, recipe, 0, global_model, job=f"job-{number}").tensors
        for number, recipe in enumerate(
            (
                quick,
                dataclasses.replace(quick, holdout=("another-site",)),
                dataclasses.replace(quick, probability_threshold=0.4),
                dataclasses.replace(quick, site_learning_rates=("another-site:1e-6",)),
            )
        )
    ]
    for number, one in enumerate(differences):
        for other in differences[:number]:
            apart = update_norm({name: one[name].float() - other[name].float() for name in one})
            assert apart > 0.05 * update_norm(one)


def test_what_cannot_be_written_down_does_not_leave(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor], tmp_path: Path
) -> None:
    """It would be forgotten with this process, and a mean of one patient fewer could leave next."""
    place.set_policy(min_cases=2)
    with small_disk(tmp_path / "disk", "8m") as work:
        trainer = task_runner(place, work)
        ask(trainer, recipe, 0, global_model)
        with (work / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 64):
                pass
        size = (work / HISTORY_FILE).stat().st_size
        with (work / HISTORY_FILE).open("ab") as file, contextlib.suppress(OSError):
            file.write(b"\n" * (-size % 4096))  # what is left of its last page
            file.flush()
        model = moved(global_model, 0.01)
        for _ in range(2):  # the second time there is nothing new to write but what waits
            error = refused("no-history", trainer, recipe, 2, model, kind="evaluate")
            assert "No space left" in error.problem and "free room" in error.fix
        (work / "filler").unlink()
        lines = (work / HISTORY_FILE).read_text().splitlines()
        assert ask(trainer, recipe, 2, model, kind="evaluate").contribution.metrics
        more = (work / HISTORY_FILE).read_text().splitlines()[len(lines) :]
        assert next(json.loads(one)["event"] for one in more if one) == "asked"


# -------------------------------------------------------------------------------------- sets


def told(history: History, patients: str, smallest: int = 3) -> str | None:
    """Of which patients a mean leaves; a letter each, a large one where there is another scan."""
    names = {history.name(one.lower(), one): one for one in patients}
    found = history.may_tell("cases", frozenset(names), smallest)
    if found is None:
        return None
    history.told("cases", found)
    return "".join(sorted(one for name, one in names.items() if name in found))


def test_two_sets_of_patients_differ_in_none_or_in_at_least_min_cases(tmp_path: Path) -> None:
    history = History(tmp_path, SECRET)
    assert told(history, "abcde") == "abcde"
    assert told(history, "abcde") == "abcde"
    assert told(history, "abcdef") == "abcde"  # one who is new counts with the next two
    assert told(history, "abcdefg") == "abcde"
    history = History(tmp_path, SECRET)  # a new process
    assert told(history, "abcdefgh") == "abcdefgh"
    assert told(history, "bcdefgh") is None  # one withdrew
    assert told(history, "bcdefghi") is None
    assert told(history, "bcdefghij") == "bcdefghij"  # with the next k they come back
    assert told(history, "abcdefghijklm") == "abcdefghijklm"
    assert told(history, "abxyz") == "abxyz"
    assert told(history, "ab") is None


def test_a_patient_with_another_scan_is_one_in_whom_two_sets_differ(tmp_path: Path) -> None:
    """The same patients, and the mean of before beside it would tell that scan's score."""
    history = History(tmp_path, SECRET)
    assert told(history, "abcdef") == "abcdef"
    assert told(history, "Abcdef") is None
    assert told(history, "ABcdef") is None
    assert told(history, "ABCdef") == "ABCdef"
    assert told(history, "abcdef") == "abcdef"


def test_a_history_is_of_one_secret(tmp_path: Path) -> None:
    """With another one no patient and no model of before would be known again."""
    history = History(tmp_path, SECRET)
    assert told(history, "abcde") == "abcde"
    assert told(History(tmp_path, SECRET), "abcd") is None
    with pytest.raises(DoorClosed, match=r"another secret") as caught:
        told(History(tmp_path, b"t" * 32), "abcd")
    assert caught.value.code == "no-history"


def test_a_patient_who_comes_or_goes_is_in_no_mean_that_leaves(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor], phantoms: Path
) -> None:
    """Two validation patients of eight; all eight are scored where the site is a holdout."""
    for name in ("images", "labels"):
        (place.data / name).unlink()
        shutil.copytree(phantoms / name, place.data / name)
    place.set_policy(min_cases=3)
    held_out = dataclasses.replace(recipe, holdout=(SITE,))
    trainer = task_runner(place)

    def mean(number: int) -> float | None:
        said = ask(trainer, held_out, number, global_model).contribution
        found = next(one for one in said.metrics if one.metric == "dice")
        assert (found.mean is None) == (found.cases == 0)
        return found.mean

    first = mean(0)
    assert first is not None
    for folder in ("images", "labels"):
        (place.data / folder / "phantom-003.nii.gz").rename(place.root / f"{folder}-003.nii.gz")
    assert mean(1) is None
    assert "phantom-001" in (place.work / "scores" / "job.csv").read_text()  # in full, here
    write_phantom_site(place.root / "new", "bright", cases=2, slices=2, seed=99)
    for folder in ("images", "labels"):
        (place.root / f"{folder}-003.nii.gz").rename(place.data / folder / "phantom-003.nii.gz")
        new = place.root / "new" / folder / "phantom-001.nii.gz"
        new.rename(place.data / folder / "phantom-009.nii.gz")
    assert mean(2) == first  # over the eight of before


@pytest.fixture
def held_out(place: Place, recipe: Recipe) -> Recipe:
    """All patients are scored, of two slices each; they come from `arrive`."""
    for name in ("images", "labels"):
        (place.data / name).unlink()
        (place.data / name).mkdir()
    place.set_policy(min_cases=3)
    return dataclasses.replace(recipe, holdout=(SITE,), optimizer_state="reset")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "site"
    write_phantom_site(folder, "bright", cases=14, slices=2, seed=5)
    return folder


# a model of another bias does as much, and no policy bounds that
ANY_THRESHOLD = {"min_probability_threshold": 1e-12, "max_probability_threshold": 1.0}


def arrive(place: Place, many: Path, numbers: range, values: dict[int, tuple[int, ...]]) -> None:
    """Patients come; of the lesion's slices each is drawn with one of these values (0: not)."""
    for number in numbers:
        name = f"phantom-{number:03d}.nii.gz"
        shutil.copy(many / "images" / name, place.data / "images")
        label = nibabel.load(many / "labels" / name)
        array = np.asarray(label.dataobj).copy()
        drawn = values.get(number, (0,))
        where = np.argwhere(array > 0)
        for index, one in enumerate(drawn):  # the lesion in as many parts
            part = where[index :: len(drawn)]
            array[tuple(part.T)] = one
        nibabel.save(nibabel.Nifti1Image(array, label.affine), place.data / "labels" / name)


def leave(place: Place, number: int) -> None:
    for kind in ("images", "labels"):
        (place.data / kind / f"phantom-{number:03d}.nii.gz").unlink()


def means(
    trainer: TaskRunner, recipe: Recipe, model: dict[str, Tensor], job: str = "job"
) -> dict[str, tuple[float | None, int]]:
    """Of each class its mean Dice and over how many cases it is, as they leave."""
    said = ask(trainer, recipe, recipe.rounds, model, job=job, kind="evaluate", which="final")
    return {
        m.class_name: (m.mean, m.cases) for m in said.contribution.metrics if m.metric == "dice"
    }


def in_full(place: Place, job: str) -> dict[str, list[float]]:
    """Of each class the Dice of those who have one, from the site's own table."""
    found: dict[str, list[float]] = {}
    for line in (place.work / "scores" / f"{job}.csv").read_text().splitlines()[1:]:
        _, _, _, name, dice, *_ = line.split(",")
        if dice != "nan":
            found.setdefault(name, []).append(float(dice))
    return found


def test_one_who_shows_a_class_is_in_no_difference_of_two_means_of_it(
    place: Place, held_out: Recipe, global_model: dict[str, Tensor], many: Path
) -> None:
    """Three join, and are enough for the site, and one of them shows the lesion."""
    trainer = task_runner(place)
    arrive(place, many, range(1, 11), dict.fromkeys(range(1, 5), (1,)))
    first = means(trainer, held_out, global_model, "one")["lesion"]
    assert first[0] is not None
    arrive(place, many, range(11, 14), {11: (1,)})
    second = means(trainer, held_out, global_model, "two")["lesion"]
    assert len(in_full(place, "two")["lesion"]) > len(in_full(place, "one")["lesion"])
    assert second[0] == first[0]  # over those of before; counts of few leave as no difference
    leave(place, 1)  # shows it; three others are not scored any more, who do not
    for number in (8, 9, 10):
        leave(place, number)
    assert means(trainer, held_out, global_model, "three")["lesion"] == (None, 0)


def test_what_a_model_finds_in_few_who_do_not_show_a_class_does_not_leave(
    place: Place, held_out: Recipe, global_model: dict[str, Tensor], many: Path
) -> None:
    """A model chooses in whom something is found: two sets of patients that the server makes."""
    place.set_policy(min_cases=3, **ANY_THRESHOLD)
    trainer = task_runner(place)
    arrive(place, many, range(1, 7), dict.fromkeys(range(1, 6), (1,)))  # all but one show it
    all_found = dataclasses.replace(held_out, probability_threshold=1e-9)
    none_found = dataclasses.replace(held_out, probability_threshold=1 - 1e-9)
    mean, cases = means(trainer, all_found, global_model, "all")["lesion"]
    by_case = in_full(place, "all")["lesion"]
    assert len(by_case) == 6 and 0.0 in by_case
    assert mean == round(statistics.mean(sorted(by_case)[1:]), 3)
    assert means(trainer, none_found, global_model, "none")["lesion"] == (0.0, cases)
    for number in range(7, 10):  # three who do not are told of
        arrive(place, many, range(number, number + 1), {})
    mean, cases = means(trainer, all_found, global_model, "more")["lesion"]
    by_case = in_full(place, "more")["lesion"]
    assert (mean, cases) == (round(statistics.mean(by_case), 3), 9)


def test_two_classes_of_which_a_patient_has_one_mask_are_held_against_each_other(
    place: Place, held_out: Recipe, global_model: dict[str, Tensor], many: Path
) -> None:
    """A network may give both the same; then the mean of one beside the other's tells a patient."""
    classes = {"lesion": [1], "either": [1, 2], "both": [2, 3]}
    place.set_site(classes=classes, not_annotated=[])
    arrive(
        place,
        many,
        range(1, 9),
        {**dict.fromkeys(range(1, 5), (1,)), 5: (2,), 6: (1, 3), 7: (1, 3), 8: (1, 3)},
    )
    two = dataclasses.replace(held_out, classes=("lesion", "either"))
    model = _model_of(two, place)
    found = means(task_runner(place), two, model)
    assert found["lesion"][0] is not None
    assert found["either"][1] == found["lesion"][1]  # not over the fifth, who is in one of them
    apart = dataclasses.replace(held_out, classes=("lesion", "both"))
    found = means(task_runner(place), apart, _model_of(apart, place), "apart")
    assert found["both"][0] is not None  # four show it, and none with the lesion's mask


def _model_of(recipe: Recipe, place: Place) -> dict[str, Tensor]:
    return read_travelling(build_model(recipe, place.checkpoints / "random.safetensors"))


def test_means_of_a_version_that_did_not_look_at_classes_count(tmp_path: Path) -> None:
    """Nobody wrote down who of them showed a class: as many may have as were there."""
    names = History(tmp_path, SECRET)

    def of_all(patients: str) -> frozenset[str]:
        return frozenset(names.name(one, "there") for one in patients)

    def of_class(patients: str) -> frozenset[str]:
        return frozenset(names.name(one, "there", "1") for one in patients)

    line = {"event": "told", "what": "scores", "patients": sorted(of_all("abcdefgh"))}
    (tmp_path / HISTORY_FILE).write_text(json.dumps(line) + "\n")

    def may(show: str, scored: str) -> bool:
        history = History(tmp_path, SECRET)
        return history.may_tell("class", of_class(show), 3, of_all(scored)) == of_class(show)

    assert History(tmp_path, SECRET).may_tell("cases", of_all("abcdefg"), 3) is None
    assert may("abcd", "abcdefgh")  # the very set of before, whoever shows the class
    assert may("abcd", "abcdefghijk")  # three more, none of whom shows it
    assert not may("abcdi", "abcdefghijk")  # one of whom does
    assert may("abcdijk", "abcdefghijk")
    assert not may("abcd", "abcdefgijk")  # one is gone, who may have
    assert may("abcijk", "abcdefgijk")


def rows_of(place: Place, job: str) -> list[tuple[float, float]]:
    """Dice and HD95 of each case of one class, from the site's own table."""
    lines = (place.work / "scores" / f"{job}.csv").read_text().splitlines()[1:]
    return [(float(line.split(",")[4]), float(line.split(",")[6])) for line in lines]


def test_one_in_whom_alone_something_is_found_is_told_by_no_mean(
    place: Place, held_out: Recipe, global_model: dict[str, Tensor], many: Path
) -> None:
    """A threshold takes all foreground away from all but a few, of whom the mean would tell."""
    place.set_policy(min_cases=3, **ANY_THRESHOLD)
    trainer = task_runner(place)
    arrive(place, many, range(1, 9), dict.fromkeys(range(1, 9), (1,)))

    def scored(threshold: float) -> tuple[dict[str, Metric], list[tuple[float, float]]]:
        recipe = dataclasses.replace(held_out, probability_threshold=threshold)
        job = f"job-{threshold:.12f}".replace(".", "-")
        said = ask(trainer, recipe, 3, global_model, job=job, kind="evaluate", which="final")
        return {one.metric: one for one in said.contribution.metrics}, rows_of(place, job)

    told, rows = scored(1 - 1e-9)
    nowhere = [hd95 for _, hd95 in rows]  # the diagonal, which is of nobody
    assert told["dice"].mean == 0 and told["hd95"].mean == round(statistics.mean(nowhere), 3)
    seen, low, high = set(), 1e-9, 1 - 1e-9
    for _ in range(24):  # towards the threshold at which the last patients have any left
        middle = (low + high) / 2
        told, rows = scored(middle)
        counted = sum(dice > 0.02 for dice, _ in rows)
        found = sum(hd95 != none for (_, hd95), none in zip(rows, nowhere, strict=True))
        assert (told["dice"].mean is None) == (told["iou"].mean is None) == (0 < counted < 3)
        assert (told["hd95"].mean is None) == (0 < counted < 3 or 0 < found < 3)
        if 0 < counted < 3:
            assert {(one.mean, one.std, one.cases, one.empty) for one in told.values()} == {
                (None, None, 0, 0)
            }
        seen.add(counted)
        low, high = (middle, high) if counted > 1 else (low, middle)
    assert seen & {1, 2} and max(seen) >= 3
