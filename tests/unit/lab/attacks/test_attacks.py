"""The attacks work where nothing is bounded, and come to nothing under the default policy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fedfms.contracts.policy import POLICY_FILE, Policy
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import CheckpointError, FedfmsError
from fedfms.exchange.bounds import breaches, check_drawn, check_patients, check_steps
from fedfms.files import file_sha256
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint, load_checkpoint
from fedfms.models.travelling import write_travelling
from fedfms.training.loop import accumulate_gradients
from fedfms_lab.attacks.inversion import (
    at_the_bounds,
    attack,
    best_fits,
    mixtures,
    picture,
    settings,
)
from fedfms_lab.attacks.matching import Matcher, Prior
from fedfms_lab.attacks.membership import attack_members, membership
from fedfms_lab.attacks.single_cases import (
    mean_and_spread,
    one_more_of_a_class,
    one_patient_more,
    one_training_patient,
)
from fedfms_lab.attacks.sites import (
    OPEN,
    Attacked,
    AttackedSite,
    Refusal,
    averaged,
    first_model,
    for_phantoms,
)
from fedfms_lab.cli.audit import commands

REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def job() -> Recipe:
    recipe = Recipe.from_json(REPOSITORY / "jobs/fedsam/app/config/recipe.json")
    return for_phantoms(dataclasses.replace(recipe, image_size=64))


@pytest.fixture(scope="module")
def fedmsa() -> Recipe:
    recipe = Recipe.from_json(REPOSITORY / "jobs/fedmsa/app/config/recipe.json")
    return for_phantoms(dataclasses.replace(recipe, image_size=64, loss="bce"))


def test_a_picture_follows_from_the_gradient_of_its_patch_embedding(job: Recipe) -> None:
    model = build_model(job, find_checkpoint(job, None))
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 64, 64, generator=generator)
    target = (image[:, :1, ::2, ::2] > 0).float()[..., : job.mask_size, : job.mask_size]
    batch = {"image": image, "target": target, "annotated": torch.ones(1, 1)}
    accumulate_gradients(model, batch, job, 1, Control())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = picture(
        gradients["image_encoder.pos_embed"].double(),
        gradients["image_encoder.patch_embed.proj.weight"].double(),
        1e-6,
    )
    fit = best_fits(found[None], image.mean(dim=1), torch.zeros(64, 64))
    assert fit[0] > 0.95


def test_mixtures_are_what_a_linear_adam_makes_of_its_steps(job: Recipe) -> None:
    recipe = dataclasses.replace(job, batch_size=2, local_epochs=2, warmup_steps=3, rounds=4)
    slices = 5
    found = mixtures(recipe, [slices], 2)
    from fedfms.training.loop import ShuffledBatches, learning_rate

    gradients = torch.eye(slices, dtype=torch.float64) * 1e-14  # far below Adam's epsilon
    moved = []
    for number in range(2):
        batches = list(ShuffledBatches(slices, recipe, number))
        weights = torch.nn.Parameter(torch.zeros(slices, dtype=torch.float64))
        adam = torch.optim.Adam([weights], lr=1.0)
        for step, batch in enumerate(batches):
            rate = learning_rate(recipe, number * len(batches) + step, len(batches))
            adam.param_groups[0]["lr"] = rate
            weights.grad = gradients[batch].mean(dim=0)
            adam.step()
        moved.append(-weights.detach().numpy())
    expected = np.stack(moved)
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-4)


def test_pictures_are_found_without_bounds_and_refused_by_the_default_policy(
    job: Recipe, tmp_path: Path
) -> None:
    without, _, under, same, *_ = settings(job, {}, 8)
    found = attack(job, without, tmp_path / "without", others=1)
    assert found.median > 0.6 > 2 * found.median_by_chance
    assert found.shows_something
    refused = attack(job, under, tmp_path / "under", others=1)
    assert (refused.rounds, refused.shows_something) == (0, False)
    assert "batch_size is 1" in refused.refused and "(min_batch_size)" in refused.refused
    twice = attack(job, same, tmp_path / "same", others=1)
    assert twice.rounds == 1 and "(same-model)" in twice.refused


@pytest.mark.parametrize(
    "attempt", [mean_and_spread, one_patient_more, one_more_of_a_class, one_training_patient]
)
def test_single_patients_follow_without_bounds_and_not_by_the_default_policy(
    job: Recipe, tmp_path: Path, attempt
) -> None:
    before = attempt(job, OPEN, tmp_path / "open")
    assert before.shows_something
    after = attempt(job, {}, tmp_path / "policy")
    assert after.error is None and not after.shows_something


def test_a_prior_of_all_components_holds_the_pictures_that_it_was_made_of() -> None:
    generator = torch.Generator().manual_seed(2)
    pictures = torch.randn(6, 3, 8, 8, generator=generator) * 4 + 1
    outlines = (torch.rand(6, 1, 4, 4, generator=generator) > 0.5).float()
    prior = Prior(pictures, outlines, 5)  # of six points in all directions
    axes = torch.stack([torch.cat([p.flatten() for p in prior.decoded(z)]) for z in torch.eye(5)])
    mean = torch.cat([part.flatten() for part in prior.decoded(torch.zeros(5))])
    assert prior.components == 5
    torch.testing.assert_close(mean[:192], pictures.mean(dim=0).flatten())
    wanted = pictures[3].flatten() - mean[:192]
    fit = torch.linalg.lstsq((axes - mean)[:, :192].T, wanted[:, None]).solution
    torch.testing.assert_close((axes - mean)[:, :192].T @ fit, wanted[:, None], rtol=0, atol=0.01)


def test_gradients_of_fedmsa_show_their_own_slice_more_than_another(
    fedmsa: Recipe, tmp_path: Path
) -> None:
    matcher = Matcher(fedmsa, tmp_path / "public")
    images, outlines = AttackedSite(tmp_path / "site", cases=4, slices=1, seed=1, policy={}).slices(
        fedmsa
    )
    weights = matcher.first_model()
    model = build_model(fedmsa, find_checkpoint(fedmsa, None))
    write_travelling(model, weights)
    batch = {"image": images[:1], "target": outlines[:1], "annotated": torch.ones(1, 1)}
    accumulate_gradients(model, batch, fedmsa, 1, Control())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == weights.keys()
    pictures, drawn = matcher.found([{n: -g.double() for n, g in gradients.items()}], [weights])
    usual, outline = matcher.prior.decoded(torch.zeros(matcher.prior.components))
    own, *others = best_fits(pictures, images.mean(dim=1), usual.mean(dim=0))
    assert own > 0.15 + max(others)
    own, *others = best_fits(drawn, outlines[:, 0], outline[0])
    assert own > 0.3 + max(others)


def test_members_are_told_where_few_were_trained_on_often_and_not_where_the_policy_refuses(
    fedmsa: Recipe, tmp_path: Path
) -> None:
    often = dataclasses.replace(fedmsa, rounds=2, local_epochs=20, batch_size=5, loss="dice_bce")
    told = attack_members(often, {}, tmp_path / "often")
    assert (told.rounds, told.members, told.others) == (2, 30, 60)
    assert told.shows_something
    refused = attack_members(often, {"max_local_epochs": 5}, tmp_path / "refused")
    assert (refused.rounds, refused.shows_something) == (0, False)
    assert "local_epochs" in refused.refused


LOOSE = {
    "min_batch_size": 1,
    "min_clip_grad_norm": 1e-12,
    "max_learning_rate": 100.0,
    "min_training_patients": 1,
    "min_steps": 1,
}


def audited(folder: Path, policy: Mapping[str, object], *options: str) -> tuple[int, Any]:
    """What the command ends with, and what it says."""
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / POLICY_FILE).write_text(json.dumps(policy))
    small = ["--set", "image_size=64", "--set", "rounds=1", "--set", "local_epochs=1"]
    few = ["--rounds", "2", "--others", "1", "--policy", str(folder / "policy"), "--json"]
    job = str(REPOSITORY / "jobs/fedsam")
    done = CliRunner().invoke(commands, [job, *small, *few, *options])
    assert isinstance(done.exception, SystemExit | None), done.output
    return done.exit_code, json.loads(done.stdout)


def test_a_loose_policy_is_attacked_at_its_own_limits_and_the_command_fails(tmp_path: Path) -> None:
    code, said = audited(tmp_path, LOOSE, "--only", "4")
    (at_its_bounds,) = said["pictures"]
    assert at_its_bounds["median"] > 0.6 > 2 * at_its_bounds["median_by_chance"]
    assert code == 1


def test_the_default_policy_refuses_the_recipe_and_single_patients_stay_hidden(
    tmp_path: Path,
) -> None:
    code, said = audited(tmp_path, {}, "--only", "3")
    (found,) = said["pictures"]
    assert "(batch-too-small)" in found["refused"] and found["not_attacked"] == ""
    assert [one["not_attacked"] for one in said["cases"]["the policy"]] == [""] * 4
    assert said["members"]["not_attacked"] == "" and said["members"]["rounds"] == 1
    assert code == 0


@pytest.mark.parametrize("policy", [{}, LOOSE, {"min_training_patients": 17, "min_steps": 30}])
def test_recipes_at_the_bounds_are_ones_that_the_policy_lets_through(
    job: Recipe, policy: dict[str, Any]
) -> None:
    rules = Policy(**policy)
    tried = [one for one in settings(job, policy, 8) if one.policy == policy]
    for one in tried[1:]:  # the first is as it was found
        recipe = dataclasses.replace(job, **one.recipe)
        assert breaches(rules, recipe) == []
        check_patients(rules, one.patients)
        check_steps(rules, recipe, one.patients * one.slices)
        check_drawn(rules, recipe, one.patients)
    loosest = at_the_bounds(Policy(**OPEN))
    assert (loosest["batch_size"], loosest["clip_grad_norm"]) == (1, 1e-12)
    usual = at_the_bounds(Policy())
    assert (usual["batch_size"], usual["clip_grad_norm"], usual["local_epochs"]) == (4, 0.1, 2)


def three(folder: Path, count: int = 3) -> list[AttackedSite]:
    return [
        AttackedSite(
            folder / f"site-{n}",
            cases=2 + 2 * n,
            slices=1,
            seed=n,
            policy=OPEN,
            order_from_seed=True,
            remembers=False,
            name=f"site-{n}",
        )
        for n in range(count)
    ]


def test_of_a_secure_sum_the_server_has_what_the_sites_answers_sum_to(
    job: Recipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(job, batch_size=1, local_epochs=1, secure_sum=True)
    plain = dataclasses.replace(recipe, secure_sum=False)
    sites, model = three(tmp_path), first_model(recipe)
    seen = Attacked(sites).ask(recipe, 0, model)
    alone = [Attacked([site]).ask(plain, 0, model) for site in sites]
    assert seen.slices == sum(one.slices for one in alone) == 8
    expected = averaged(model, alone)
    for name, tensor in averaged(model, [seen]).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_recipe_of_secure_sums_is_attacked_by_the_sum(job: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(job, secure_sum=True)
    without = settings(recipe, {}, 3)[0]
    one = dataclasses.replace(without, patients=1, slices=1)
    found = attack(recipe, one, tmp_path, others=1)
    assert (found.refused, found.not_attacked, found.rounds) == ("", "", 3)
    assert (found.sums_of, found.slices, found.sites) == (3, 3, 2)
    assert np.isfinite([found.median, found.largest_by_chance]).all()
    told = attack_members(dataclasses.replace(recipe, rounds=1), {}, tmp_path / "members")
    assert (told.refused, told.not_attacked, told.rounds) == ("", "", 1)


def test_what_the_policy_does_not_refuse_is_said_as_not_attacked(
    job: Recipe, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(job, secure_sum=True)
    with pytest.raises(FedfmsError) as two:
        Attacked(three(tmp_path, 2)).ask(recipe, 0, first_model(recipe))
    why = Refusal.of(two.value)
    assert why.by_policy == "" and "(few-for-a-sum)" in why.not_attacked
    small = dataclasses.replace(settings(job, {}, 2)[3], patients=9)
    found = attack(job, small, tmp_path / "small", others=1)
    assert found.refused == "" and "(too-few-training-patients)" in found.not_attacked
    assert not found.shows_something


def test_a_checkpoint_of_any_folder_is_attacked(job: Recipe, tmp_path: Path) -> None:
    state = load_checkpoint(find_checkpoint(job, None))
    state["image_encoder.patch_embed.proj.weight"] *= 1.5
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "other.safetensors"
    save_file(state, path)
    recipe = dataclasses.replace(job, backbone_sha256=file_sha256(path))
    one = dataclasses.replace(settings(recipe, {}, 1)[0], patients=1, slices=1)
    with pytest.raises(CheckpointError) as missing:
        attack(recipe, one, tmp_path / "sites", others=1)
    assert missing.value.code == "wrong-checkpoint"
    found = attack(recipe, one, tmp_path / "sites", others=1, checkpoints=path.parent)
    assert found.rounds == 1 and found.median > 0.6
    hidden = one_training_patient(recipe, {}, tmp_path / "one", path.parent)
    assert "(too-few-training-patients)" in hidden.told


def test_the_area_under_the_curve_is_the_share_of_pairs_in_the_right_order() -> None:
    members, others = [0.1, 0.2, 0.5], [0.3, 0.5, 0.9, 0.05]
    pairs = [(m < o) + 0.5 * (m == o) for m in members for o in others]
    assert membership(members, others).auc == pytest.approx(np.mean(pairs))
