"""What is kept of a run at the server, and found again by a process of its job that starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedfms.errors import FederationError
from fedfms.exchange.tensors import load_tensors, save_tensors
from fedfms.flare.run_state import Keeping, RunState, begin_to_keep, keep, restore, rounds_kept
from fedfms.records.layout import BEST_MODEL, GLOBAL_MODEL, RECIPE, RECORDS

RECIPE_SHA256 = "ab" * 32


def a_round(kept: Path, results: Path, number: int, **state: object) -> None:
    """The server's result folder after a round, kept."""
    results.mkdir(parents=True, exist_ok=True)
    with (results / RECORDS).open("a") as file:
        file.write(f'{{"record": "round_done", "round": {number - 1}}}\n')
    (results / RECIPE).write_text("{}")
    save_tensors(results / GLOBAL_MODEL, {"w": torch.full((3,), float(number))}, "fp32")
    strategy = {"moment": torch.tensor([number / 2])}
    keep(kept, results, Keeping(RunState(number, RECIPE_SHA256, **state), strategy))


def test_what_was_kept_comes_back_whole_in_an_empty_folder(tmp_path: Path) -> None:
    kept, results, again = tmp_path / "kept", tmp_path / "results", tmp_path / "again"
    results.mkdir()
    save_tensors(results / BEST_MODEL, {"w": torch.ones(3)}, "fp32")
    a_round(kept, results, 1, best_rounds=0, reached={"best": {"site-1": {"lesion": 0.5}}})
    again.mkdir()
    found = restore(kept, again, RECIPE_SHA256)
    assert found is not None
    assert (found.state.rounds_done, found.state.best_rounds) == (1, 0)
    assert found.state.reached == {"best": {"site-1": {"lesion": 0.5}}}
    assert found.strategy()["moment"].tolist() == [0.5]
    for name in (RECORDS, RECIPE, GLOBAL_MODEL, BEST_MODEL):
        assert (again / name).read_bytes() == (results / name).read_bytes()


def test_records_go_on_in_one_file_and_what_was_half_written_is_cut_off(tmp_path: Path) -> None:
    kept, results, again = tmp_path / "kept", tmp_path / "results", tmp_path / "again"
    a_round(kept, results, 1)
    with (results / RECORDS).open("a") as file:
        file.write('{"record": "round_started", "round": 1}\n{"record": "contrib')
    again.mkdir()
    restore(kept, again, RECIPE_SHA256)
    assert (again / RECORDS).read_text().splitlines()[-1] == (
        '{"record": "round_started", "round": 1}'
    )
    assert (again / RECORDS).samefile(kept / RECORDS)


def test_the_last_two_rounds_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    kept, results = tmp_path / "kept", tmp_path / "results"
    for number in (1, 2, 3):
        a_round(kept, results, number)
    assert sorted(path.name for path in kept.glob("round-*")) == ["round-0002", "round-0003"]
    assert rounds_kept(kept) == 3
    model = kept / "round-0003" / GLOBAL_MODEL
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.unlink()  # a link to the same file in results
    model.write_bytes(data)
    found = restore(kept, results, RECIPE_SHA256)
    assert found is not None and found.state.rounds_done == 2
    assert load_tensors(results / GLOBAL_MODEL)["w"].tolist() == [2.0, 2.0, 2.0]


def test_a_thousand_rounds_of_a_hundred_sites_are_found_again(tmp_path: Path) -> None:
    """The guard remembers each difference, to know a replay."""
    kept, results = tmp_path / "kept", tmp_path / "results"
    seen = {f"{number:024x}": f"site-{number % 100}" for number in range(100_000)}
    a_round(kept, results, 1000, guard={"seen": seen})
    found = restore(kept, results, RECIPE_SHA256)
    assert found is not None and found.state.guard == {"seen": seen}


@pytest.mark.parametrize("damage", ["cut", "other recipe", "no model"])
def test_a_run_of_which_nothing_can_be_used_is_one_error(tmp_path: Path, damage: str) -> None:
    kept, results = tmp_path / "kept", tmp_path / "results"
    a_round(kept, results, 1)
    folder, recipe = kept / "round-0001", RECIPE_SHA256
    if damage == "cut":
        (folder / "state.json").write_text('{"rounds_done": 1')
    elif damage == "no model":
        (folder / GLOBAL_MODEL).unlink()
    else:
        recipe = "cd" * 32
    with pytest.raises(FederationError) as caught:
        restore(kept, results, recipe)
    assert caught.value.code == "damaged-run"


def test_a_run_that_begins_finds_nothing(tmp_path: Path) -> None:
    assert restore(tmp_path / "kept", tmp_path, RECIPE_SHA256) is None
    assert rounds_kept(tmp_path / "kept") == 0


def test_records_are_kept_from_the_first_line_on(tmp_path: Path) -> None:
    """A job that fails in its first round is known to have come to its end."""
    kept, results, again = tmp_path / "kept", tmp_path / "results", tmp_path / "again"
    results.mkdir()
    again.mkdir()
    assert not begin_to_keep(kept, results)
    with (results / RECORDS).open("a") as file:
        file.write('{"record": "job"}\n{"record": "round_st')
    assert (kept / RECORDS).read_text().startswith('{"record": "job"}\n')
    assert begin_to_keep(kept, again)  # a process of before: its records go on
    assert (again / RECORDS).read_text() == '{"record": "job"}\n'
    assert (again / RECORDS).samefile(kept / RECORDS)
