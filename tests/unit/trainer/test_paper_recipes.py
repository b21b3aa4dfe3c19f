"""The recipes of the paper's protocol, run by a site's trainer on phantoms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.local.synthetic import write_phantom_site
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling, travelling_names
from fedfms.records.scores import over_classes
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import SiteFolders, TaskRunner
from fedfms.training.loop import round_seed
from fedfms.training.pooled import PooledRound, train_pooled

RECIPES = Path(__file__).resolve().parents[3] / "jobs" / "recipes"
SMALL = ["backbone=vit_demo", "image_size=128"]
METHODS = ("fedmsa", "fedsam")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the site's site.yml says: sums in the same order
    yield
    torch.set_num_threads(before)


def paper(method: str, *overrides: str) -> Recipe:
    return Recipe.from_json(RECIPES / f"{method}-paper.json").with_overrides(overrides)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms whose only structure is called disc; the cup is its brighter part, drawn alike."""
    folder = tmp_path_factory.mktemp("paper") / "site"
    write_phantom_site(folder, "bright", cases=6, slices=2, seed=1)
    path = folder / "site.yml"
    values = yaml.safe_load(path.read_text())
    (drawn,) = values["classes"].values()
    values["classes"] = {"optic_disc": drawn, "optic_cup": drawn}
    path.write_text(yaml.safe_dump({**values, "min_cases": 1, "threads": 1}))
    few = {"min_cases": 1, "min_training_patients": 1, "min_steps": 1}
    (folder / "policy" / "privacy.json").write_text(json.dumps(few))
    return folder


def trainer(site: Path, work: Path) -> TaskRunner:
    return TaskRunner(
        SiteFolders(
            name="site-1",
            config=site / "site.yml",
            policy=site / "policy",
            data_root=None,
            checkpoints=None,
            work=work,
            order_from_seed=True,
        )
    )


def run(
    runner: TaskRunner, recipe: Recipe, number: int, tensors: Mapping[str, Tensor], kind="train"
) -> Outcome:
    model = "round" if kind == "train" else "final"
    task = Task(kind=kind, site="site-1", job="job", round=number, model=model, recipe=recipe)
    return runner.run(task, lambda: tensors, Control())


def start_of(recipe: Recipe) -> dict[str, Tensor]:
    return read_travelling(build_model(recipe, find_checkpoint(recipe, None)))


@pytest.mark.parametrize("method", METHODS)
def test_the_recipes_say_what_the_paper_says(method: str) -> None:
    """Against facts of the paper's code, written here a second time; docs/protocol.md has them."""
    recipe = paper(method)
    assert recipe.method == method
    assert (recipe.backbone, recipe.backbone_sha256) == ("vit_b", BACKBONES["vit_b"].sha256)
    assert (recipe.image_size, recipe.mask_size) == (1024, 256)
    assert (recipe.resize, recipe.normalize) == ("stretch", False)
    assert (recipe.rounds, recipe.local_epochs, recipe.evaluate_every) == (100, 1, 5)
    scored = [number for number in range(100) if recipe.evaluates(number)]
    assert scored == list(range(1, 97, 5)) and len(scored) + 1 == 21  # and the model of 100 rounds
    assert recipe.start_draws == ((1.0, 1.0, 1.0) if method == "fedmsa" else ())
    assert recipe.site_order[-1] == "Drishti-GS1"
    assert recipe.batch_size == {"fedmsa": 4, "fedsam": 6}[method]
    assert (recipe.learning_rate, recipe.optimizer_state) == (1e-4, "keep")
    assert (recipe.schedule, recipe.warmup_steps, recipe.clip_grad_norm) == ("constant", 0, None)
    assert (recipe.loss, recipe.positive_weight) == ("bce", 2.0)
    assert (recipe.precision, recipe.transfer_precision) == ("fp32", "fp32")
    assert (recipe.seed, recipe.paper_compat) == (1337, True)


def plain_round(
    model: nn.Module,
    adam: torch.optim.Optimizer,
    dataset: SliceDataset,
    recipe: Recipe,
    number: int,
) -> float:
    """One epoch with torch's plain Adam and BCE with positive weight 2; the mean loss."""
    generator = torch.Generator().manual_seed(round_seed(recipe, number))
    order, total = torch.randperm(len(dataset), generator=generator), 0.0
    for items in order.split(recipe.batch_size):
        batch = torch.utils.data.default_collate([dataset[int(item)] for item in items])
        adam.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(batch["image"]), batch["target"], pos_weight=torch.tensor(2.0)
        )
        loss.backward()
        adam.step()
        total += loss.item() * len(items)
    return total / len(dataset)


def farthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of any value, but for the biases of attention keys.

    Softmax cancels what they add: their gradient is rounding noise, of which Adam makes steps.
    """
    differences = {name: one[name] - other[name] for name in one if "k_proj.bias" not in name}
    for name, difference in differences.items():
        if name.endswith("qkv.bias"):
            queries, _, values = difference.chunk(3)
            differences[name] = torch.cat([queries, values])
    return max(float(difference.abs().max()) for difference in differences.values())


@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("method", METHODS)
def test_two_rounds_of_the_papers_recipe_equal_a_plain_loop_with_one_adam(
    site: Path, tmp_path: Path, method: str, state: str
) -> None:
    """Between the rounds another model comes back, as after averaging; the moments stay or go."""
    recipe = paper(method, *SMALL, f"optimizer_state={state}")
    config = SiteConfig.from_yaml(site / "site.yml")
    cases = prepare_cases(find_cases(config), config, Control())
    dataset = SliceDataset([case for case in cases if case.case.split == "train"], config, recipe)
    plain = build_model(recipe, find_checkpoint(recipe, None))
    learning = {name: dict(plain.named_parameters())[name] for name in travelling_names(plain)}

    def new_adam() -> torch.optim.Optimizer:
        return torch.optim.Adam(learning.values(), lr=1e-4, foreach=False, fused=False)

    continued, runner = new_adam(), trainer(site, tmp_path)
    distance = {"keep": 0.0, "reset": 0.0}  # of round 1 from one Adam over both, and from a new one
    sent = start_of(recipe)
    for number in range(2):
        got = run(runner, recipe, number, sent)
        assert set(got.tensors) == set(learning) == set(sent)
        for how in ("reset", "keep"):  # last the one that goes on
            with torch.no_grad():
                for name, parameter in learning.items():
                    parameter.copy_(sent[name])
            if how == "reset" and number == 0:
                continue
            loss = plain_round(
                plain, continued if how == "keep" else new_adam(), dataset, recipe, number
            )
            changed = {name: p.detach() - sent[name] for name, p in learning.items()}
            off = farthest(changed, got.tensors)
            if number == 0:
                assert off < 5e-6  # a twentieth of one step
                assert got.contribution.loss == pytest.approx(loss, abs=6e-4)  # of 3 decimals
            else:
                distance[how] = off
        sent = {name: 0.9 * tensor + 0.5 * got.tensors[name] for name, tensor in sent.items()}
    other = "reset" if state == "keep" else "keep"
    assert distance[state] < 5e-6
    assert distance[other] > 2e-5


@pytest.mark.parametrize("holdout", [False, True], ids=["trains", "holdout"])
def test_a_site_scores_every_fifth_model_and_always_the_final_one(
    site: Path, tmp_path: Path, holdout: bool
) -> None:
    recipe = paper("fedmsa", *SMALL, *(["holdout=site-1"] if holdout else []))
    tensors, runner = start_of(recipe), trainer(site, tmp_path)
    scored = 6 if holdout else 2  # all cases of a holdout, else the validation cases
    for number in (0, 1, 5, 6, 99):
        model = {name: tensor + 0.001 * number for name, tensor in tensors.items()}
        said = run(runner, recipe, number, model).contribution
        due = number in (1, 6)
        assert said.evaluated_cases == (scored if due else 0)
        assert bool(said.metrics) == ("evaluate" in said.seconds) == due
        assert (over_classes(said.metrics, "dice") is not None) == due
        assert said.training_slices == (0 if holdout else 8)
        assert (said.loss is None) == holdout
    final = run(runner, recipe, 99, tensors, kind="evaluate").contribution
    assert final.evaluated_cases == scored
    assert {metric.metric for metric in final.metrics} >= {"dice", "iou", "hd95", "dice_slice"}
    rounds = [line.split(",")[0] for line in next((tmp_path / "scores").iterdir()).open()]
    assert set(rounds[1:]) == {"1", "6", "99"}  # the site's own table as well


def test_training_alone_scores_as_often_as_the_recipe_says_and_at_the_end(site: Path) -> None:
    recipe = paper("fedmsa", *SMALL, "rounds=3", "evaluate_every=2", "evaluate_first=0")
    told: list[PooledRound] = []
    train_pooled(
        recipe,
        {"here": SiteConfig.from_yaml(site / "site.yml")},
        checkpoints=None,
        control=Control(),
        on_round=told.append,
    )
    assert [one.rounds_trained for one in told] == [0, 1, 2, 3]
    assert [bool(one.metrics["here"]) for one in told] == [True, False, True, True]
    assert [one.loss is not None for one in told] == [False, True, True, True]
