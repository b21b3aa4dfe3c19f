"""The site's account of what training costs its patients, and the limit of its policy."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
from torch import Tensor
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.policy import MOST_EPSILON, Policy
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import ConfigError, DoorClosed
from fedfms.exchange.account import Noised, epsilon
from fedfms.trainer.budget import ACCOUNT, Budget
from fedfms.trainer.egress import ROOM
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import TaskRunner
from small_disk import small_disk

NOISED = {"patient_rate": 0.5, "patient_clip_norm": 0.5, "patient_noise": 4.0}


def private(recipe: Recipe, **changes: object) -> Recipe:
    return dataclasses.replace(recipe, evaluate_first=recipe.rounds, **{**NOISED, **changes})


def train(
    trainer: TaskRunner, recipe: Recipe, number: int, sent: dict[str, Tensor], job: str = "job"
) -> Outcome:
    task = Task(kind="train", site=SITE, job=job, round=number, model="round", recipe=recipe)
    return trainer.run(task, lambda: sent, Control())


def test_the_door_closes_before_the_limit(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    recipe = private(recipe)  # three rounds of two steps
    of_six = epsilon([Noised(4.0, 0.5, 6)], 1e-5)
    place.set_policy(patient_epsilon=1.1 * of_six)
    trainer = task_runner(place)
    sent = global_model
    for number in range(3):
        answer = train(trainer, recipe, number, sent).tensors
        sent = {name: tensor + answer[name] for name, tensor in sent.items()}
    spent, _ = Budget(place.root / "work").spent(Policy.from_folder(place.policy))
    assert spent.epsilon == pytest.approx(of_six)
    with pytest.raises(DoorClosed) as caught:  # another run, asked by whomever
        train(trainer, recipe, 0, global_model, job="other")
    assert caught.value.code == "privacy-budget"
    assert "3 rounds" in caught.value.problem
    assert f"allows {1.1 * of_six:g}" in caught.value.problem
    assert (place.root / "work" / ACCOUNT).read_text().count("\n") == 3

    with pytest.raises(DoorClosed):  # also when what was kept of the run is forgotten
        trainer.forget("job")
        train(trainer, recipe, 0, global_model)


def test_a_run_that_would_pass_it_does_not_begin(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(patient_epsilon=0.95 * epsilon([Noised(4.0, 0.5, 6)], 1e-5))
    with pytest.raises(DoorClosed) as caught:
        train(task_runner(place), private(recipe), 0, global_model)
    assert caught.value.code == "privacy-budget"
    assert not (place.root / "work" / ACCOUNT).exists()


def test_a_canary_says_so_and_costs_nothing(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    recipe = private(recipe, canary=True)
    place.set_policy(patient_epsilon=0.1)
    with pytest.raises(DoorClosed) as caught:
        train(task_runner(place), recipe, 0, global_model)
    assert caught.value.code == "privacy-budget"
    place.set_policy(patient_epsilon=100.0)
    train(task_runner(place), recipe, 0, global_model)
    assert not (place.root / "work" / ACCOUNT).exists()


def test_the_same_request_costs_once(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    recipe = private(recipe)
    first = train(task_runner(place), recipe, 0, global_model)
    again = train(task_runner(place), recipe, 0, global_model)
    for name, tensor in first.tensors.items():
        assert tensor.equal(again.tensors[name])
    assert (place.root / "work" / ACCOUNT).read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ({"patient_epsilon": 100.0}, {"patient_noise": 0.0}),
        ({"patient_epsilon": 100.0}, dict.fromkeys(NOISED, None) | {"patient_noise": 0.0}),
        ({"site_epsilon": 100.0}, {}),
    ],
)
def test_a_round_without_noise_passes_any_limit(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor], policy: dict, changes: dict
) -> None:
    place.set_policy(**policy)
    with pytest.raises(DoorClosed) as caught:
        train(task_runner(place), private(recipe, **changes), 0, global_model)
    assert caught.value.code == "privacy-budget"
    assert "infinite" in caught.value.problem


def test_noise_on_the_whole_difference_counts_for_the_site_and_doubly_for_a_patient(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(clip_norm=1.0, noise_std=20.0, site_epsilon=2.0, patient_epsilon=4.0)
    train(
        task_runner(place),
        dataclasses.replace(recipe, evaluate_first=recipe.rounds),
        0,
        global_model,
    )
    patient, site = Budget(place.root / "work").spent(Policy.from_folder(place.policy))
    assert site.epsilon == epsilon([Noised(20.0)], 1e-5)
    assert patient.epsilon == epsilon([Noised(10.0)], 1e-5)


def test_no_loss_leaves_of_patients_who_were_promised_noise(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    assert train(task_runner(place), private(recipe), 0, global_model).contribution.loss is None


def test_days_before_the_count_began_are_not_counted(place: Place, recipe: Recipe) -> None:
    work = place.root / "work"
    work.mkdir(exist_ok=True)
    plain, policy = dataclasses.replace(recipe), Policy()
    Budget(work).add(policy, plain, "job", 0)  # without noise
    assert math.isinf(Budget(work).spent(policy)[0].epsilon)
    line = json.loads((work / ACCOUNT).read_text())
    line["time"] = 1_700_000_000.0  # 2023-11-14
    (work / ACCOUNT).write_text(json.dumps(line) + "\n")
    assert math.isinf(Budget(work).spent(Policy(counted_since="2023-11-14"))[0].epsilon)
    assert Budget(work).spent(Policy(counted_since="2023-11-15"))[0].epsilon == 0


@pytest.mark.parametrize("damage", [b"{\n", b"\xff\xfe\n", b'{"time": 1}\n', b"[]\n"])
def test_a_damaged_account_closes_the_door(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor], damage: bytes
) -> None:
    work = place.root / "work"
    work.mkdir(exist_ok=True)
    (work / ACCOUNT).write_bytes(damage)
    place.set_policy(patient_epsilon=8.0)
    with pytest.raises(DoorClosed) as caught:
        train(task_runner(place), private(recipe), 0, global_model)
    assert caught.value.code == "privacy-account"


def test_what_a_power_cut_left_of_a_line_did_not_leave_and_the_count_goes_on(
    place: Place, recipe: Recipe
) -> None:
    work, policy = place.root / "work", Policy(clip_norm=1.0, noise_std=20.0)
    Budget(work).add(policy, recipe, "job", 0)
    whole = (work / ACCOUNT).read_bytes()
    (work / ACCOUNT).write_bytes(whole + whole[:30])
    assert Budget(work).spent(policy)[1].epsilon == epsilon([Noised(20.0)], 1e-5)
    assert (work / ACCOUNT).read_bytes() != whole  # who only reads cuts nothing
    Budget(work).add(policy, recipe, "job", 1)
    assert Budget(work).spent(policy)[1].epsilon == epsilon([Noised(20.0, steps=2)], 1e-5)


@pytest.mark.parametrize("clock", [0.0, 1_000_000_000.0])
def test_a_clock_that_is_wrong_takes_no_round_out_of_the_count(
    place: Place, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    """Nor does a day that is still to come."""
    monkeypatch.setattr("fedfms.trainer.budget.time.time", lambda: clock)
    policy = Policy(counted_since="2026-11-27")
    Budget(place.work).add(policy, recipe, "job", 0)  # without noise
    assert math.isinf(Budget(place.work).spent(policy)[0].epsilon)


def test_drawn_patients_and_noise_are_not_drawn_twice_for_one_difference(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(min_cases=1)  # without a limit, too: two draws average out
    trainer = task_runner(place)
    train(trainer, private(recipe), 0, global_model)
    for job in ("other", "job"):
        trainer.forget("job")
        with pytest.raises(DoorClosed) as caught:
            train(trainer, private(recipe), 0, global_model, job=job)
        assert caught.value.code == "answered-before"


def test_where_epsilon_has_a_limit_no_score_of_a_training_patient_leaves(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    """At a holdout all cases are scored, and its scores have no noise."""
    held_out = dataclasses.replace(recipe, holdout=(SITE,))

    def scored(number: int) -> int:
        said = train(task_runner(place), held_out, number, global_model).contribution
        return said.evaluated_cases

    assert scored(0) == 8
    place.set_policy(min_cases=1, patient_epsilon=8.0)
    assert scored(1) == 2


def test_a_limit_that_no_account_can_reach_is_refused() -> None:
    """An epsilon of 200 stands for all that is larger: a limit there never closes the door."""
    for key in ("patient_epsilon", "site_epsilon"):
        for value in (100.5, 200.0, 1e9, float("inf"), float("nan")):
            with pytest.raises(ConfigError, match=key):
                Policy(**{key: value})
        Policy(**{key: MOST_EPSILON})
    assert epsilon([Noised(1e-9)] * 10, 1e-5) > MOST_EPSILON


def test_a_full_disk_takes_no_round_out_of_the_count_and_then_nothing_leaves(
    tmp_path: Path, recipe: Recipe
) -> None:
    policy = Policy(clip_norm=1.0, noise_std=20.0)
    with small_disk(tmp_path / "disk", "2m") as work:
        (work / ROOM).write_bytes(os.urandom(2**16))
        budget = Budget(work)
        budget.add(policy, recipe, "job", 0)
        with (work / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        for number in range(1, 101):  # some pages of the disk
            budget.add(policy, recipe, "job", number)
        with pytest.raises(DoorClosed, match="No space left") as caught:
            for number in range(1000):
                budget.add(policy, recipe, "job", number)
        assert caught.value.code == "privacy-account"
        assert "free room" in caught.value.fix
        assert (work / ACCOUNT).read_bytes().endswith(b"\n")
