"""Every value of a recipe that shapes what leaves has its bound, and a refusal names both."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from fedfms.contracts.policy import Bounds, Policy
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ConfigError, DoorClosed
from fedfms.exchange.bounds import check_patients, check_steps
from fedfms.exchange.door import check_job
from fedfms.training.loop import learning_rate

REPOSITORY = Path(__file__).resolve().parents[3]
RECIPE = Recipe.from_json(REPOSITORY / "jobs/fedmsa/app/config/recipe.json")
# augmentations beyond a policy that allows a little of each
STRONG = [
    ("scale", 1.5, 1.25),
    ("elastic", 0.03, 0.02),
    ("gamma", 3.0, 2.5),
    ("bias", 0.5, 0.4),
    ("blur", 0.01, 0.005),
    ("noise", 0.2, 0.1),
]
LITTLE = Policy(**{f"max_augment_{name}": most for name, _, most in STRONG})


@pytest.mark.parametrize(
    ("values", "code", "field", "limit"),
    [
        ({"batch_size": 1}, "batch-too-small", "batch_size is 1", "4 slices (min_batch_size)"),
        (
            *({"clip_grad_norm": 1e-12}, "clip-too-small"),
            *("clip_grad_norm is 1e-12", "at least 0.1 (min_clip_grad_norm)"),
        ),
        (
            *({"learning_rate": 1e-9, "schedule": "constant"}, "learning-rate-not-allowed"),
            *("learning_rate is 1e-09", "at least 1e-06 (min_learning_rate)"),
        ),
        (
            *({"learning_rate": 1e9}, "learning-rate-not-allowed"),
            *("learning_rate is 1e+09", "at most 0.1 (max_learning_rate)"),
        ),
        (
            *({"positive_weight": 1e-12}, "positive-weight-not-allowed"),
            *("positive_weight is 1e-12", "at least 0.01 (min_positive_weight)"),
        ),
        (
            *({"positive_weight": 1e9}, "positive-weight-not-allowed"),
            *("positive_weight is 1e+09", "at most 1000 (max_positive_weight)"),
        ),
        (
            *({"local_epochs": 10**9}, "too-many-epochs"),
            *("local_epochs is 1000000000", "at most 50 (max_local_epochs)"),
        ),
        (
            *({"image_size": 8}, "image-size-not-allowed"),
            *("image_size is 8", "at least 64 pixels (min_image_size)"),
        ),
        (
            *({"image_size": 1000000}, "image-size-not-allowed"),
            *("image_size is 1000000", "at most 2048 pixels (max_image_size)"),
        ),
        *(
            (
                *({f"augment_{name}": value, "augment": True}, "augmentation-not-allowed"),
                *(f"augment_{name} is {value:g}", f"at most {most} (max_augment_{name})"),
            )
            for name, value, most in STRONG
        ),
        (
            *({"proximal_weight": 2.0}, "proximal-weight-not-allowed"),
            *("proximal_weight is 2", "at most 1 (max_proximal_weight)"),
        ),
        (
            *({"probability_threshold": 0.9999}, "threshold-not-allowed"),
            *("probability_threshold is 0.9999", "at most 0.9 (max_probability_threshold)"),
        ),
        (
            *({"probability_threshold": 0.001}, "threshold-not-allowed"),
            *("probability_threshold is 0.001", "at least 0.1 (min_probability_threshold)"),
        ),
        (
            *({"rounds": 1001, "schedule": "constant"}, "too-many-rounds"),
            *("rounds is 1001", "at most 1000 rounds (max_rounds)"),
        ),
    ],
)
def test_a_refusal_names_the_field_its_value_and_the_limit(values, code, field, limit) -> None:
    recipe = dataclasses.replace(RECIPE, **values)
    policy = LITTLE if code == "augmentation-not-allowed" else Policy()
    with pytest.raises(DoorClosed) as refused:
        check_job(policy, recipe)
    error = refused.value
    assert error.code == code
    assert field in error.problem and limit in error.problem
    name = limit.rpartition("(")[2].rstrip(")")
    assert name in error.fix and field.split()[0] in error.fix
    always = ("image-size-not-allowed", "threshold-not-allowed", "too-many-rounds")
    only_scores = code in always
    with pytest.raises(DoorClosed) if only_scores else contextlib.nullcontext():
        check_job(policy, recipe, trains=False)
    value = next(iter(values.values()))  # the very limit is allowed
    check_job(dataclasses.replace(policy, **{name: value}), recipe)


def test_few_patients_and_few_steps_are_refused_and_the_limits_are_not() -> None:
    with pytest.raises(DoorClosed, match=r"at least 10 patients \(min_training_patients.*9 are"):
        check_patients(Policy(), 9)
    check_patients(Policy(), 10)
    recipe = dataclasses.replace(RECIPE, local_epochs=1, batch_size=8)
    with pytest.raises(
        DoorClosed, match=r"at least 4 steps \(min_steps.*a round has 3 .*batch_size"
    ):
        check_steps(Policy(), recipe, 24)
    check_steps(Policy(), recipe, 25)


@pytest.mark.parametrize(
    "path",
    sorted([*REPOSITORY.glob("jobs/*/app/config/recipe.json"), *REPOSITORY.glob("jobs/recipes/*")]),
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_the_recipes_that_are_shipped_are_within_the_default_bounds(path: Path) -> None:
    recipe = Recipe.from_json(path)
    if recipe.method == "unet":  # of the laboratory: a site has to name it
        with pytest.raises(DoorClosed, match="add unet to methods"):
            check_job(Policy(), recipe)
        check_job(Policy(methods=("unet",)), recipe)
    else:
        check_job(Policy(), recipe)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"min_batch_size": 0}, "min_batch_size is 0"),
        ({"min_clip_grad_norm": -1.0}, "min_clip_grad_norm is -1.0"),
        ({"max_learning_rate": 1e-9}, "min_learning_rate is 1e-06, and max_learning_rate 1e-09"),
        ({"min_image_size": 4096}, "min_image_size is 4096, and max_image_size 2048"),
        ({"min_cases_for_spread": 0}, "min_cases_for_spread is 0"),
        ({"min_batch": 4}, "unknown key 'min_batch'"),
    ],
)
def test_a_bound_that_means_nothing_is_no_policy(tmp_path: Path, values, problem: str) -> None:
    (tmp_path / "privacy.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as error:
        Policy.from_folder(tmp_path)
    assert problem in error.value.problem


def test_a_policy_of_before_has_the_default_bounds(tmp_path: Path) -> None:
    (tmp_path / "privacy.json").write_text('{"min_cases": 3, "pictures": true}')
    assert Policy.from_folder(tmp_path).bounds == Bounds()


def test_no_round_that_a_server_asks_for_has_a_lower_rate_than_the_policy_allows() -> None:
    """Also the last one, asked for at once: of each recipe that passes, by the loop's own rate."""
    least = Policy().min_learning_rate
    passed = []
    for schedule, rate, rounds, warmup, steps in itertools.product(
        ("constant", "cosine"), (1e-6, 5e-5, 1e-4, 3e-3), (1, 2, 11, 12, 200), (0, 20), (4, 50)
    ):
        recipe = dataclasses.replace(
            RECIPE, schedule=schedule, learning_rate=rate, rounds=rounds, warmup_steps=warmup
        )
        lowest = min(
            max(learning_rate(recipe, number * steps + step, steps) for step in range(steps))
            for number in range(rounds)
        )
        try:
            check_job(Policy(), recipe)
        except DoorClosed:
            assert lowest < least
        else:
            passed.append((schedule, rate, rounds))
            assert (
                lowest >= least * (0.4 if rounds == 1 else 1) - 1e-15
            )  # warm-up and fall in one round
    assert {("cosine", 1e-4, 200), ("cosine", 3e-3, 200), ("constant", 1e-6, 200)} <= {*passed}
    assert ("cosine", 5e-5, 11) in passed
    assert not {("cosine", 1e-6, 2), ("cosine", 5e-5, 12)} & {*passed}
    with pytest.raises(DoorClosed) as caught:
        check_job(Policy(), dataclasses.replace(RECIPE, learning_rate=5e-5, rounds=1000))
    assert caught.value.code == "learning-rate-not-allowed"
    assert "falls to 5e-07 at the beginning of the last of 1000" in caught.value.problem
    assert "set schedule to constant" in caught.value.fix


def test_shipped_recipes_fall_no_lower() -> None:
    recipes = [
        *REPOSITORY.glob("jobs/*/app/config/recipe.json"),
        *REPOSITORY.glob("jobs/recipes/*"),
    ]
    assert len(recipes) > 4
    for path in recipes:
        check_job(Policy(methods=("fedsam", "fedmsa", "lora", "unet")), Recipe.from_json(path))
