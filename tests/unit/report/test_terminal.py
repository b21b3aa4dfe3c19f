"""What a terminal says of a run: the table at its end, and a line for each round."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from job_writer import RECIPE, Job, dice_of

from fedfms.cli.common import _round_line, show_result
from fedfms.flare.progress import Event, JobProgress
from fedfms.report.collect import collect

TWO = dataclasses.replace(RECIPE, classes=("anterior", "posterior"))


def said(capsys: pytest.CaptureFixture[str], tmp_path: Path, job: Job) -> list[str]:
    collect(job.write(tmp_path / "job"), tmp_path / "results")
    show_result(tmp_path / "results", as_json=False)
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], *words: str) -> list[str]:
    return next(found for line in lines if (found := line.split())[: len(words)] == list(words))


def rounds(tmp_path: Path, job: Job) -> tuple[list[str], Event]:
    """The line of each round, told by a coordinator on another machine."""
    job.write(tmp_path / "job")
    reader = JobProgress(tmp_path / "job" / "records.jsonl", job.recipe.rounds)
    reader.read_new()
    sent: dict[str, Any] = json.loads(json.dumps(reader.event().to_dict()))
    event = Event.from_dict(sent)
    assert event == dataclasses.replace(reader.event(), time=event.time, left=event.left)
    return [_round_line(one, event) for one in event.finished], event


def test_the_table_is_class_by_class_where_sites_differ_in_classes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = Job(recipe=TWO, withheld=(), missed={}, not_annotated={"site-1": ("posterior",)})
    lines = said(capsys, tmp_path, job)
    assert row(lines, "site-1", "posterior")[3:] == ["14", "–", "–", "–", "–", "0"]
    assert "site-1 does not annotate posterior" in lines
    assert f"{dice_of('site-2', 6, 1):.3f}" in row(lines, "site-2", "posterior")
    after = (dice_of("site-2", 6, 1) + dice_of("site-3", 6, 1)) / 2
    text = "\n".join(lines)
    assert re.search(rf"mean of 2 of 3 training sites, posterior: .* {after:.3f} after", text)
    assert re.search(r"mean of the training sites, anterior: ", text)


def test_a_missing_evaluation_and_a_silent_site_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = Job(
        withheld=(),
        missed={(number, "site-2"): "TrainerError (no-trainer); more" for number in range(6)},
        no_evaluation={"site-2": "no answer within 600 s"},
    )
    lines = said(capsys, tmp_path, job)
    assert "site-2 did not evaluate the final model and the best model" in lines
    assert any("nothing of site-2 is in this model" in line for line in lines)
    assert any(line.startswith("mean of 2 of 3 training sites: ") for line in lines)


def test_a_rounds_mean_says_over_how_many_sites_where_some_are_missing(tmp_path: Path) -> None:
    lines, _ = rounds(tmp_path, Job(withheld=()))
    for number, line in enumerate(lines):
        sites = [n for n in (1, 2, 3) if (number, n) != (2, 2)]
        mean = sum(dice_of(f"site-{n}", number) for n in sites) / len(sites)
        assert f": {mean:.3f}" in line
        assert line.endswith(" (2 of 3 training sites)") == (number == 2)


def test_a_round_is_told_class_by_class_where_sites_differ_in_classes(tmp_path: Path) -> None:
    job = Job(recipe=TWO, withheld=(), missed={}, not_annotated={"site-1": ("posterior",)})
    lines, event = rounds(tmp_path, job)
    anterior = sum(dice_of(f"site-{n}", 0) for n in (1, 2, 3)) / 3
    posterior = sum(dice_of(f"site-{n}", 0, 1) for n in (2, 3)) / 2
    assert lines[0].endswith(
        f"anterior {anterior:.3f} (3 of 3 training sites); "
        f"posterior {posterior:.3f} (2 of 3 training sites)"
    )
    assert event.finished[0].dice is None
