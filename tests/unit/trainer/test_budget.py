"""The site's account of what training costs its patients, and the limit of its policy."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from torch import Tensor
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import DoorClosed
from fedfms.exchange.account import Noised, epsilon
from fedfms.trainer.budget import ACCOUNT, Budget
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import TaskRunner

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
        ({"patient_epsilon": 1000.0}, {"patient_noise": 0.0}),
        ({"patient_epsilon": 1000.0}, dict.fromkeys(NOISED, None) | {"patient_noise": 0.0}),
        ({"site_epsilon": 1000.0}, {}),
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
