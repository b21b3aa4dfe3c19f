"""A trainer's part in secure sums, over its own socket and beside other sites' trainers."""

from __future__ import annotations

import dataclasses
import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from trainer_process import SITE, Place, TrainerProcess, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.sums import SumsAnswer, SumsAsk
from fedfms.control import Control
from fedfms.errors import DoorClosed
from fedfms.exchange.averaging import FixedSum
from fedfms.exchange.secure_sum import ServerRound
from fedfms.exchange.tensors import fingerprint
from fedfms.trainer.budget import ACCOUNT
from fedfms.trainer.client import TaskResult, run_task
from fedfms.trainer.connection import ask_sums, forget
from fedfms.trainer.kept import KeptRun
from fedfms.trainer.own_key import own_key
from fedfms.trainer.sums import PEERS, SUMS, Sums

JOB = "job-1"


@pytest.fixture
def secure(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, secure_sum=True)


class Others:
    """Trainers of two more sites, without their images; each site knows the other ones' keys."""

    def __init__(self, place: Place) -> None:
        folder = place.root / "others"
        works = {name: folder / name for name in ("site-2", "site-3")} | {SITE: place.work}
        keys = {name: own_key(work).public for name, work in works.items()}
        folder.mkdir(exist_ok=True)
        (folder / PEERS).write_text(json.dumps(keys))
        (place.policy / PEERS).write_text(json.dumps(keys))
        self.place = place
        self.sums = {
            name: Sums(name, work, folder / PEERS) for name, work in works.items() if name != SITE
        }

    def ask(self, site: str, ask: SumsAsk) -> SumsAnswer:
        if site == SITE:
            return ask_sums(self.place.exchange, ask)
        return self.sums[site].answer(ask)

    def settle(self, server: ServerRound) -> None:
        sites, ask = (SITE, *self.sums), server.ask_keys()
        ask = server.ask_shares({site: self.ask(site, ask) for site in sites})
        for site, one in server.ask_take({site: self.ask(site, ask) for site in sites}).items():
            self.ask(site, one)


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(DoorClosed) as raised:
        action()
    return raised.value.code


def test_a_trainer_masks_what_leaves_and_its_successor_masks_it_alike(
    start: Callable[..., TrainerProcess],
    place: Place,
    train_task: Task,
    secure: Recipe,
    global_model: dict[str, torch.Tensor],
) -> None:
    task = dataclasses.replace(train_task, recipe=secure)
    trainer = start()
    others, server = Others(place), ServerRound(JOB, 0)

    def train() -> TaskResult:
        return run_task(place.exchange, task, global_model)

    assert code_of(train) == "no-sum"
    others.settle(server)
    (kept,) = (place.work / SUMS / JOB).iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    trainer.kill()
    trainer.end()
    start()
    masked = train()
    again = train()
    assert all(torch.equal(masked.tensors[name], again.tensors[name]) for name in masked.tensors)
    assert {one.dtype for one in masked.tensors.values()} == {torch.int64}
    assert masked.contribution.update_norm is None
    receipt = masked.receipt.receipt
    assert receipt.tensors_sha256 == fingerprint(masked.tensors)
    assert receipt.norm is None
    assert receipt.payload_bytes == 8 * receipt.values > 0

    plain = task_runner(place, place.root / "plain").run(
        train_task, lambda: global_model, Control()
    )
    slices = plain.contribution.training_slices
    assert masked.contribution.training_slices == slices
    expected = FixedSum()
    expected.add(plain.tensors, slices)
    server.add(masked.tensors)
    for site, sums in others.sums.items():
        numbers = torch.Generator().manual_seed(len(site))
        theirs = {n: torch.randn(t.shape, generator=numbers) for n, t in plain.tensors.items()}
        expected.add(theirs, 5)
        server.add(sums.masked(JOB, 0, theirs, 5))
    sites = (SITE, *others.sums)
    ask = server.ask_unmask(sites)
    answers = {site: others.ask(site, ask) for site in sites}
    found = server.unmask(sites, slices + 10, answers).mean()
    mean = expected.mean()
    assert all(torch.equal(found[name], mean[name]) for name in mean)

    fewer = dataclasses.replace(ask, arrived=(SITE, "site-2"))
    assert code_of(lambda: others.ask(SITE, fewer)) == "other-sum"
    forget(place.exchange, JOB)
    assert not (place.work / SUMS / JOB).exists()
    assert code_of(lambda: others.ask(SITE, ask)) == "no-sum"


def test_what_one_seed_hides_is_said_of_no_earlier_round(tmp_path: Path) -> None:
    sums = Sums("site-1", tmp_path, tmp_path / PEERS)
    for number in (0, 1, 2, 3):
        sums.answer(SumsAsk(step="keys", job=JOB, round=number))
    assert sorted(path.name for path in (tmp_path / SUMS / JOB).iterdir()) == [
        "0002.json",
        "0003.json",
    ]
    over = SumsAsk(step="keys", job=JOB, round=1)
    assert code_of(lambda: sums.answer(over)) == "no-sum"


@pytest.mark.parametrize("content", [None, "[]", '{"site-2": "no key"}', '{"site-2": 3}', "{"])
def test_a_site_that_does_not_know_its_peers_takes_part_in_no_sum(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / PEERS).write_text(content)
    sums = Sums("site-1", tmp_path, tmp_path / PEERS)
    keys = sums.answer(SumsAsk(step="keys", job=JOB, round=0)).keys
    assert keys is not None
    ask = SumsAsk(step="shares", job=JOB, round=0, keys=(keys,))
    assert code_of(lambda: sums.answer(ask)) == "no-peers"


def test_a_policy_that_asks_for_sums_trains_by_no_other_recipe(
    place: Place, train_task: Task, global_model: dict[str, torch.Tensor], secure: Recipe
) -> None:
    place.set_policy(require_secure_sum=True)
    runner = task_runner(place)
    assert code_of(lambda: runner.run(train_task, lambda: global_model, Control())) == (
        "sum-required"
    )
    task = dataclasses.replace(train_task, recipe=secure)
    assert code_of(lambda: runner.run(task, lambda: global_model, Control())) == "no-sum"
    scores = dataclasses.replace(train_task, kind="evaluate", model="final", round=3)
    assert runner.run(scores, lambda: global_model, Control()).tensors == {}


def settled(sites: Mapping[str, Sums], number: int, job: str = JOB) -> ServerRound:
    server = ServerRound(job, number)
    ask = server.ask_keys()
    ask = server.ask_shares({name: one.answer(ask) for name, one in sites.items()})
    for name, one in server.ask_take({n: s.answer(ask) for n, s in sites.items()}).items():
        sites[name].answer(one)
    return server


def test_a_mask_is_used_once_also_by_a_trainer_that_started_again(tmp_path: Path) -> None:
    """And what could wrap a sum in 32 bits is refused with the way out; it uses no mask."""
    names = ("site-1", "site-2", "site-3")
    peers = tmp_path / PEERS
    peers.write_text(json.dumps({name: own_key(tmp_path / name).public for name in names}))
    sites = {name: Sums(name, tmp_path / name, peers) for name in names}
    settled(sites, 0)
    ones = {"w": torch.ones(5)}
    with pytest.raises(DoorClosed, match=r"w holds 1, which times 9000 slices and 3 sites") as no:
        sites["site-1"].masked(JOB, 0, ones, 9000, 32)
    assert no.value.code == "sums-wrap" and "secure_sum_bits=64" in no.value.fix
    first = sites["site-1"].masked(JOB, 0, ones, 90, 32)
    assert first["w"].dtype == torch.int32
    again = Sums("site-1", tmp_path / "site-1", peers)
    assert torch.equal(again.masked(JOB, 0, ones, 90, 32)["w"], first["w"])
    for tensors, weight, bits in (({"w": torch.zeros(5)}, 90, 32), (ones, 91, 32), (ones, 90, 64)):
        assert code_of(lambda t=tensors, w=weight, b=bits: again.masked(JOB, 0, t, w, b)) == (
            "summed-before"
        )


def test_a_difference_is_clipped_at_the_site_where_the_server_cannot_look(
    place: Place, train_task: Task, global_model: dict[str, torch.Tensor], secure: Recipe
) -> None:
    """As long as `max_update_norm` allows; unmasked, the server would have refused it."""
    task = dataclasses.replace(train_task, recipe=dataclasses.replace(secure, max_update_norm=1e-3))
    runner = task_runner(place)
    sites = {"site-2": Sums("site-2", place.root / "2", place.policy / PEERS)}
    sites |= {"site-3": Sums("site-3", place.root / "3", place.policy / PEERS), SITE: runner.sums}
    works = {"site-2": place.root / "2", "site-3": place.root / "3", SITE: place.work}
    keys = {name: own_key(work).public for name, work in works.items()}
    (place.policy / PEERS).write_text(json.dumps(keys))
    server = settled(sites, 0)
    outcome = runner.run(task, lambda: global_model, Control())
    nothing = {name: torch.zeros(one.shape) for name, one in outcome.tensors.items()}
    server.add(outcome.tensors)
    for name in ("site-2", "site-3"):
        server.add(sites[name].masked(JOB, 0, nothing, 1))
    ask = server.ask_unmask(sites)
    answers = {name: one.answer(ask) for name, one in sites.items()}
    total = outcome.contribution.training_slices + 2
    mean = server.unmask(sites, total, answers).mean()
    square = sum(float((one.double() ** 2).sum()) for one in mean.values())
    norm = square**0.5 * total / outcome.contribution.training_slices
    assert norm == pytest.approx(1e-3, rel=1e-4)

    settled(sites, 1)  # the site's own history has the norm that the server does not see
    same = dataclasses.replace(task, round=1)
    assert code_of(lambda: runner.run(same, lambda: global_model, Control())) == "same-model"
    settled(sites, 0, "job-2")  # of which a site may be missing
    again = dataclasses.replace(task, job="job-2")
    assert code_of(lambda: runner.run(again, lambda: global_model, Control())) == "summed-before"

    near = {name: one + 1e-6 for name, one in global_model.items()}
    settled(sites, 1, "job-2")  # near by what was learnt, however little of it left
    almost = dataclasses.replace(task, job="job-2", round=1)
    assert code_of(lambda: runner.run(almost, lambda: near, Control())) == "same-model"

    settled(sites, 0, "job-3")  # the recipe says of how many bits what leaves is
    coarse = dataclasses.replace(task.recipe, secure_sum_bits=32)
    half = dataclasses.replace(task, job="job-3", recipe=coarse)
    tensors = runner.run(half, lambda: global_model, Control()).tensors
    assert {one.dtype for one in tensors.values()} == {torch.int32}


def test_a_round_that_cannot_be_masked_is_in_the_account(
    place: Place, train_task: Task, global_model: dict[str, torch.Tensor], secure: Recipe
) -> None:
    """What it learnt stays at the site in part, and shows in what leaves next."""
    runner = task_runner(place)
    works = {name: place.root / name for name in ("site-2", "site-3")} | {SITE: place.work}
    keys = {name: own_key(work).public for name, work in works.items()}
    (place.policy / PEERS).write_text(json.dumps(keys))
    sites = {n: Sums(n, work, place.policy / PEERS) for n, work in works.items() if n != SITE}
    settled({**sites, SITE: runner.sums}, 0)
    task = dataclasses.replace(
        train_task, recipe=dataclasses.replace(secure, optimizer_state="keep")
    )
    other = {"w": torch.ones(3)}
    runner.sums.masked(JOB, 0, other, 5)  # so that the mask is used
    assert code_of(lambda: runner.run(task, lambda: global_model, Control())) == "summed-before"
    assert KeptRun(place.work, JOB).learnt_before(1) is not None
    assert len((place.work / ACCOUNT).read_bytes().splitlines()) == 1


def test_under_the_mask_of_a_round_leaves_one_difference_and_no_second(
    place: Place, train_task: Task, global_model: dict[str, torch.Tensor], secure: Recipe
) -> None:
    """Who asks for the same round with another model would see how the two answers differ."""
    task, runner = dataclasses.replace(train_task, recipe=secure), task_runner(place)
    works = {name: place.root / name for name in ("site-2", "site-3")} | {SITE: place.work}
    keys = {name: own_key(work).public for name, work in works.items()}
    (place.policy / PEERS).write_text(json.dumps(keys))
    sites = {n: Sums(n, work, place.policy / PEERS) for n, work in works.items() if n != SITE}
    settled({**sites, SITE: runner.sums}, 0)
    first = runner.run(task, lambda: global_model, Control())

    moved = {name: one + 0.01 for name, one in global_model.items()}
    assert code_of(lambda: runner.run(task, lambda: moved, Control())) == "summed-before"
    runner = task_runner(place)  # a trainer after it
    assert code_of(lambda: runner.run(task, lambda: moved, Control())) == "summed-before"
    same = runner.run(task, lambda: global_model, Control())
    assert all(torch.equal(same.tensors[name], first.tensors[name]) for name in first.tensors)

    other = {"w": torch.ones(3)}
    masked = sites["site-2"].masked(JOB, 0, other, 5)
    assert torch.equal(sites["site-2"].masked(JOB, 0, other, 5)["w"], masked["w"])
    assert code_of(lambda: sites["site-2"].masked(JOB, 0, other, 6)) == "summed-before"
    assert code_of(lambda: sites["site-2"].masked(JOB, 0, {"w": torch.zeros(3)}, 5)) == (
        "summed-before"
    )
