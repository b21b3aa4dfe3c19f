"""Several processes at one gradient: equal to one process, and ended with it."""

from __future__ import annotations

import dataclasses
import signal
import time
from inspect import signature
from itertools import chain

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from trainer_process import Place, TrainerProcess, ask, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Compute, SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError, TaskAborted, TrainerError, TrainingError
from fedfms.models.build import build_model
from fedfms.trainer.client import run_task
from fedfms.trainer.ranks import Ranks
from fedfms.trainer.server import EXIT_STALLED
from fedfms.training.loop import RoundResult, train_round
from fedfms.training.ranks import rank_devices, share

CPU = torch.device("cpu")


@pytest.fixture
def two(place) -> Ranks:
    place.set_site(threads=1, device="cpu", ranks=2)
    site = SiteConfig.from_yaml(place.data / "site.yml")
    ranks = Ranks([CPU, CPU], site)
    yield ranks
    ranks.close()


def slices_of(ranks: Ranks, recipe: Recipe, place) -> SliceDataset:
    cases = find_cases(ranks.site)
    prepared = prepare_cases(cases, ranks.site, Control(), folder=place.work / "cache")
    return SliceDataset(prepared, ranks.site, recipe)


def trained(
    recipe: Recipe, dataset: SliceDataset, ranks: Ranks | None, micro_batch: int, rounds: int = 1
) -> tuple[nn.Module, list[RoundResult]]:
    """A network of random weights after some rounds, in one process or in several."""
    torch.set_num_threads(1)
    model, optimizer, results = build_model(recipe, None), None, []
    for number in range(rounds):
        options = {
            "round_number": number,
            "optimizer": optimizer,
            "control": Control(),
            "micro_batch": micro_batch,
            "secret": b"s" * 32,
        }
        if ranks is None:
            site = dataclasses.replace(dataset.site, ranks=None)
            result = train_round(model, dataset, recipe, site, **options)
        else:
            control, secret = options["control"], options["secret"]
            with ranks.round(model, dataset, recipe, number, secret, control) as beside:
                result = train_round(model, dataset, recipe, ranks.site, ranks=beside, **options)
        optimizer = result.optimizer
        results.append(result)
    return model, results


def largest(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two networks' values, but of those that softmax cancels.

    The gradient of `k_proj.bias` is rounding noise, which Adam makes steps of.
    """
    values = dict(other.named_parameters())
    return max(
        float((tensor - values[name]).detach().abs().max())
        for name, tensor in one.named_parameters()
        if not name.endswith("k_proj.bias")
    )


# of all kinds, so that a slice's place in a batch, or who computes it, would show
AUGMENTED = {
    "augment": True,
    "augment_flips": "both",
    "augment_rotation": 30.0,
    "augment_elastic": 0.03,
    "augment_inversion": 0.5,
    "augment_contrast": 0.5,
    "augment_bias": 0.3,
    "augment_blur": 0.01,
    "augment_noise": 0.1,
}


@pytest.mark.parametrize("augmented", [{}, AUGMENTED], ids=["as they are", "augmented"])
def test_two_ranks_equal_one_process_that_computes_the_shares_in_turn(
    recipe, place, two, monkeypatch, augmented
):
    recipe = dataclasses.replace(
        recipe, batch_size=4, clip_grad_norm=1.0, schedule="cosine", **augmented
    )
    dataset = slices_of(two, recipe, place)
    assert len(dataset) == 16
    both, results = trained(recipe, dataset, two, 4, rounds=2)
    alone, expected = trained(recipe, slices_of(two, recipe, place), None, 2, rounds=2)
    for got, want in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.equal(got, want)  # to the last bit, after 8 steps
    assert [one.loss for one in results] == pytest.approx([one.loss for one in expected], 1e-6)
    assert [one.steps for one in results] == [4, 4]
    monkeypatch.setattr("fedfms.data.slices.resized_slice", None)
    assert [dataset[item] for item in range(16)]  # what either rank resized is kept for both


@pytest.mark.parametrize(
    ("method", "batch_size", "steps"), [("fedmsa", 6, 3), ("fedsam", 6, 3), ("fedmsa", 5, 4)]
)
def test_two_ranks_equal_one_process_with_the_same_batch(
    recipe, place, two, method, batch_size, steps
):
    # of 16 slices the last batch has 4, two a rank; or 1, and the second rank has none
    recipe = dataclasses.replace(
        recipe, method=method, batch_size=batch_size, learning_rate=1e-4, clip_grad_norm=1.0
    )
    dataset = slices_of(two, recipe, place)
    both, (result,) = trained(recipe, dataset, two, batch_size)
    alone, (expected,) = trained(recipe, dataset, None, batch_size)
    assert result.steps == steps
    assert result.loss == pytest.approx(expected.loss, 1e-6)
    assert largest(both, alone) < 1e-6


def test_shares_differ_by_one_slice_at_most_and_the_first_is_never_empty():
    for slices in range(1, 10):
        for size in range(1, 5):
            shares = [share(list(range(slices)), rank, size) for rank in range(size)]
            assert list(chain(*shares)) == list(range(slices))
            assert shares[0]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_a_rank_raises_is_raised_here_and_the_next_round_has_new_ranks(recipe, place, two):
    dataset = slices_of(two, recipe, place)
    model = build_model(recipe, None)
    with torch.no_grad():  # in the shares of all ranks
        next(model.parameters()).fill_(torch.nan)
    with (
        pytest.raises(TrainingError, match="became nan") as caught,
        two.round(model, dataset, recipe, 0, None, Control()) as beside,
    ):
        beside.gradient_of(0, 2)(model, _of_rank_0(dataset), recipe, 2, Control())
    assert caught.value.code == "non-finite-loss"
    both, _ = trained(recipe, dataset, two, 4)
    alone, _ = trained(recipe, dataset, None, 4)
    assert largest(both, alone) < 1e-5


def _of_rank_0(dataset: SliceDataset) -> dict[str, torch.Tensor]:
    """A share in which nothing is annotated, so that its loss is finite whatever the network."""
    batch = torch.utils.data.default_collate([dataset[0]])
    return {**batch, "annotated": torch.zeros_like(batch["annotated"])}


@pytest.mark.parametrize(
    ("device", "ranks", "gpus", "nccl", "expected"),
    [
        ("cpu", None, 0, False, ["cpu"]),
        ("cpu", 3, 0, False, ["cpu"] * 3),
        ("cpu", 9, 0, False, ["cpu"] * 4),  # never more than slices in a batch
        ("auto", None, 2, True, ["cuda:0", "cuda:1"]),
        ("auto", None, 2, False, ["cuda:0"]),
        ("auto", 1, 2, True, ["cuda:0"]),
        ("cuda", None, 2, True, ["cuda:0"]),
        ("cuda:1", 2, 3, True, ["cuda:1", "cuda:2"]),
    ],
)
def test_a_rank_has_a_gpu_of_its_own(recipe, monkeypatch, device, ranks, gpus, nccl, expected):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    compute = Compute(device=device, ranks=ranks)
    assert [str(one) for one in rank_devices(compute, recipe)] == expected


def test_more_ranks_than_gpus_are_refused(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="set ranks: 2 in"):
        rank_devices(Compute(ranks=3), recipe)


# ---------------------------------------------------------------------- a trainer and its ranks


def ranks_of(trainer: TrainerProcess) -> list[psutil.Process]:
    """The other ranks of a trainer and the loader processes of all."""
    return psutil.Process(trainer.pid).children(recursive=True)


def other_rank(trainer: TrainerProcess) -> psutil.Process:
    children = psutil.Process(trainer.pid).children()  # and not its loader processes
    (found,) = [one for one in children if "trainer.rank" in " ".join(one.cmdline())]
    return found


def none_is_left(processes: list[psutil.Process], seconds: float = 3) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_a_trainer_with_ranks_lives_on_when_they_die_and_takes_them_along(
    place: Place, start, begin, train_task: Task, long_task: Task, global_model
) -> None:
    place.set_site(ranks=2, threads=1, workers=1, device="cpu")
    trainer = start()
    result = run_task(place.exchange, train_task, global_model)
    place.set_site(ranks=1)
    alone = run_task(
        place.exchange, dataclasses.replace(train_task, job="alone"), global_model
    ).tensors
    compared = [name for name in alone if not name.endswith("k_proj.bias")]  # see `largest`
    assert max(float((result.tensors[n] - alone[n]).abs().max()) for n in compared) < 1e-5
    place.set_site(ranks=2)

    # a rank is killed: the task has one clear error
    thread = begin(place, long_task, global_model)
    thread.wait_for_step()
    processes = ranks_of(trainer)
    assert len(processes) >= 3  # a rank, and a loader process of each of the two
    other_rank(trainer).kill()
    thread.wait()
    assert isinstance(thread.error, TrainerError | TrainingError)
    assert thread.error.code == "rank-died"
    assert none_is_left(processes)

    # the next is stopped by its client
    thread = begin(place, long_task, global_model)
    thread.wait_for_step()
    processes, at = ranks_of(trainer), time.monotonic()
    thread.abort.set()
    thread.wait()
    assert isinstance(thread.error, TaskAborted)
    assert thread.ended_at - at < 5
    assert none_is_left(processes)

    # and then the trainer is killed
    thread = begin(place, long_task, global_model, connect_seconds=1)
    thread.wait_for_step()
    processes = ranks_of(trainer)
    assert len(processes) >= 3
    trainer.kill(signal.SIGKILL)
    assert none_is_left(processes)


def test_a_rank_that_stands_still_is_seen_by_the_watch_of_the_trainer(
    place: Place, start, begin, long_task: Task, global_model
) -> None:
    place.set_site(ranks=2, threads=1, device="cpu", stall_seconds=12)
    trainer = start()
    thread = begin(place, long_task, global_model, connect_seconds=1)
    thread.wait_for_step()
    processes = ranks_of(trainer)
    other_rank(trainer).suspend()
    assert trainer.process.wait(60) == EXIT_STALLED
    assert none_is_left(processes)


def test_a_trainer_that_is_told_to_stop_takes_its_ranks_along(
    place: Place, start, begin, long_task: Task, global_model
) -> None:
    place.set_site(ranks=2, threads=1, device="cpu")
    trainer = start()
    thread = begin(place, long_task, global_model, connect_seconds=1)
    thread.wait_for_step()
    processes = ranks_of(trainer)
    assert processes
    trainer.kill(signal.SIGTERM)
    assert trainer.process.wait(15) == 0
    assert none_is_left(processes)


def test_steps_of_patients_are_computed_in_one_process(place: Place, recipe, global_model) -> None:
    drawn = dataclasses.replace(
        recipe, patient_rate=1.0, patient_clip_norm=0.5, optimizer_state="reset", local_epochs=2
    )
    tensors = {}
    for ranks in (1, 2):
        place.set_site(ranks=ranks, threads=1, device="cpu")
        runner = task_runner(place, place.root / f"work-{ranks}")
        before = psutil.Process().children()
        tensors[ranks] = ask(runner, drawn, 0, global_model).tensors
        assert psutil.Process().children() == before
    assert all(torch.equal(tensors[1][name], tensors[2][name]) for name in tensors[1])


def test_torch_can_end_a_group_of_gpus_without_waiting_for_its_members():
    # a name of torch's own, which only ranks on GPUs use
    assert list(signature(dist.distributed_c10d._abort_process_group).parameters) == ["group"]
