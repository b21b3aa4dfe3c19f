"""records.jsonl: what one writer wrote, one reader reads, while it grows and afterwards."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
from pathlib import Path

import pytest

from fedfms.contracts.contribution import Contribution, Metric
from fedfms.errors import FederationError
from fedfms.flare.progress import WENT_ON, JobProgress
from fedfms.records.history import History
from fedfms.records.read import RecordReader, read_last, read_records
from fedfms.records.rows import (
    EvaluationRow,
    RoundRow,
    read_rounds,
    read_rows,
    write_rounds,
    write_rows,
)
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    JobRecord,
    Note,
    Record,
    Resumed,
    RoundDone,
    RoundStarted,
)
from fedfms.records.scores import class_dice, mean, over, over_classes
from fedfms.records.write import RecordWriter


def metric(name: str, value: float | None, score: str = "dice") -> Metric:
    return Metric(class_name=name, metric=score, mean=value, std=None, cases=3, empty=0)


SAID = Contribution(
    site="site-1",
    kind="train",
    role="train",
    round=0,
    model="round",
    recipe_sha256="a" * 64,
    backbone_sha256="b" * 64,
    package_version="0.1.0",
    training_slices=7,
    training_cases=3,
    evaluated_cases=3,
    metrics=(metric("disc", 0.1 + 0.2), metric("cup", None)),
    loss=1e-17,
    seconds={"train": 1.5},
)

JOB: tuple[Record, ...] = (
    JobRecord(job_id="1", name="fedmsa", started=2.5, recipe_sha256="a" * 64, sites=("site-1",)),
    RoundStarted(round=0),
    ContributionRecord(
        round=0, site="site-1", accepted=True, bytes_down=8, bytes_up=4, contribution=SAID
    ),
    RoundDone(round=0, sites=("site-1",), missed={"site-2": "the site is gone"}),
    EvaluationRecord(site="site-1", model="final", pictures=("pictures/site-1-final-0.png",)),
    JobDone(status="failed", reason="the server's disk is full"),
)


def written(path: Path, records: tuple[Record, ...] = JOB) -> list[str]:
    writer = RecordWriter(path)
    for record in records:
        writer.write(record)
    return path.read_text().splitlines(keepends=True)


def untimed(records: list[Record]) -> list[Record]:
    return [record.model_copy(update={"time": None}) for record in records]


def test_what_was_written_is_read_with_every_digit_and_its_time(tmp_path):
    written(tmp_path / "records.jsonl")
    records, damaged = read_records(tmp_path / "records.jsonl")
    assert damaged == 0
    assert untimed(records) == list(JOB)
    times = [record.time for record in records]
    assert None not in times and times == sorted(times)
    answer = records[2]
    assert isinstance(answer, ContributionRecord) and answer.said == SAID


def test_the_first_line_names_the_format(tmp_path):
    line = json.loads(written(tmp_path / "records.jsonl")[0])
    assert (line["record"], line["format"]) == ("job", 1)


def test_records_from_before_they_named_a_format_are_of_the_first(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"record": "job", "time": 1.0, "job_id": "1", "sites": ["a"]}\n')
    (record,) = read_records(path)[0]
    assert record == JobRecord(time=1.0, job_id="1", sites=("a",))


def test_records_of_another_format_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"record": "job", "format": 2, "sites": ["a"]}\n')
    with pytest.raises(FederationError, match="is of another version of fedfms"):
        read_records(path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        '{"record": 7}',
        '{"record": "round_done"}',
        '{"record": "round_started", "round": true}',
        '{"record": "round_started", "round": -1}',
        '{"record": "round_started", "round": 0, "time": NaN}',
        '{"record": "contribution", "round": 0, "site": "a", "accepted": "yes"}',
        '{"record": "job_done", "status": "splendid"}',
        "\xff",
    ],
)
def test_a_damaged_line_is_counted_and_the_others_are_read(tmp_path, line):
    path = tmp_path / "records.jsonl"
    lines = written(path)
    path.write_bytes("".join([*lines[:3], f"{line}\n", *lines[3:]]).encode("latin-1"))
    records, damaged = read_records(path)
    assert (untimed(records), damaged) == (list(JOB), 1)


def test_a_kind_of_record_that_only_a_later_version_knows_is_no_damage(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join([*written(path), '{"record": "site_rejoined", "site": "a"}\n']))
    records, damaged = read_records(path)
    assert (untimed(records), damaged) == (list(JOB), 0)


def test_a_report_of_another_format_leaves_its_record_readable(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = written(path)
    values = json.loads(lines[2])
    values["contribution"]["surprise"] = 1
    path.write_text(json.dumps(values) + "\n")
    (record,), damaged = read_records(path)
    assert isinstance(record, ContributionRecord)
    assert (record.said, record.is_unreadable, record.bytes_up, damaged) == (None, True, 4, 0)


def test_a_growing_file_is_read_line_by_line_and_only_its_end_when_it_grows_no_more(tmp_path):
    path = tmp_path / "records.jsonl"
    whole = "".join(written(path))
    cut = len(whole) - 30
    path.write_text(whole[:cut])
    reader = RecordReader(path)
    assert untimed(reader.read_new()) == list(JOB[:-1])
    assert reader.read_new() == []
    assert reader.damaged == 0  # it may be being written
    path.write_text(whole)
    assert untimed(reader.read_new()) == [JOB[-1]]
    path.write_text(whole[:cut])
    assert read_records(path)[1] == 1
    path.write_text(whole.rstrip("\n"))  # only the end of the line is missing
    assert untimed(read_records(path)[0]) == list(JOB)


# ---------------------------------------------------------------------------------------- history


def test_of_two_answers_of_a_site_the_later_one_counts():
    """A first answer that was refused, then one that was taken; scores that failed, then came."""
    refused = ContributionRecord(round=0, site="site-1", accepted=False, reason="it has NaN")
    taken = ContributionRecord(round=0, site="site-1", accepted=True, contribution=SAID)
    scores = dataclasses.replace(SAID, kind="evaluate", model="final", round=1)
    silent = EvaluationRecord(site="site-1", model="final", reason="no answer")
    scored = EvaluationRecord(site="site-1", model="final", contribution=scores)
    for answers, evaluations, counts in (
        ((refused, taken), (silent, scored), True),
        ((taken, refused), (scored, silent), False),
    ):
        history = History([JOB[0], JOB[1], *answers, *evaluations], {})
        (row,) = history.round_rows()
        assert (row.accepted, row.reason is None) == (counts, counts)
        first = history.evaluation_rows()[0]
        assert first.mean == (0.1 + 0.2 if counts else None)
        assert history.missed_evaluations() == (
            [] if counts else [("site-1", "final", "no answer")]
        )


@pytest.mark.parametrize("last", [True, False])
def test_whether_a_site_withholds_its_scores_its_last_answer_says(last):
    """A policy may change between rounds; an answer without scores says nothing of it."""
    few = (dataclasses.replace(metric("disc", None), cases=0),)
    shown = (metric("disc", 0.8),)
    answers = [
        ContributionRecord(
            round=number,
            site="site-1",
            accepted=True,
            contribution=dataclasses.replace(SAID, round=number, metrics=metrics),
        )
        for number, metrics in enumerate([shown if last else few, few if last else shown, ()])
    ]
    assert History([JOB[0], *answers], {}).withholds("site-1") == last


# ------------------------------------------------------------------------------------------ means


def test_means_are_over_what_is_there_and_over_classes_only_where_all_are():
    assert mean([0.2, None, 0.4, float("nan")]) == pytest.approx(0.3)
    assert mean([None, float("inf")]) is None
    metrics = [
        metric("disc", 0.8),
        metric("cup", 0.4),
        metric("rim", None),
        metric("cup", 9.0, "hd95"),
    ]
    assert over_classes(metrics, "dice") == pytest.approx(0.6)
    assert over_classes(metrics, "iou") is None
    assert class_dice(metrics) == {"disc": 0.8, "cup": 0.4}
    assert over(class_dice(metrics), ["disc", "cup"]) == pytest.approx(0.6)
    assert over(class_dice(metrics), ["disc", "rim"]) is None


# ------------------------------------------------------------------------------------------- rows


def test_rows_are_read_as_they_were_written(tmp_path):
    rounds = (
        RoundRow(round=0, site="site-1", role="train", accepted=False, reason='late, "very"\nlate'),
        RoundRow(
            round=1,
            site="site-1",
            role="train",
            accepted=True,
            loss=1e-17,
            dice=0.1 + 0.2,
            bytes_down=0,
            class_dice={"disc": 0.5},
            seconds={"train": 1.25},
            peak_memory_bytes={"train": 2**40},
        ),
    )
    write_rounds(tmp_path / "rounds.csv", rounds)
    assert read_rounds(tmp_path / "rounds.csv") == rounds
    scores = (
        EvaluationRow(site="a\udcff", role="holdout", model="final", round=None, worst=True),
        EvaluationRow(
            site="b", role="train", model="best", round=3, metric="hd95", mean=2.0, unit="mm"
        ),
    )
    write_rows(tmp_path / "scores.csv", EvaluationRow, scores)
    assert read_rows(tmp_path / "scores.csv", EvaluationRow) == scores
    assert b"a\xff" in (tmp_path / "scores.csv").read_bytes()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text.replace("accepted", "taken"), "has no column accepted"),
        (lambda text: text.splitlines()[0].replace("site", "place") + "\n", "has no column site"),
        (lambda text: text[: text.rindex(",")].rpartition(",")[0] + "\n", "more or fewer cells"),
        (lambda text: text.rstrip("\n") + ",7\n", "more or fewer cells"),
        (lambda text: text.replace("0,site", "zero,site"), "invalid literal"),
    ],
)
def test_a_damaged_table_is_an_error(tmp_path, spoil, says):
    path = tmp_path / "rounds.csv"
    write_rounds(path, [RoundRow(round=0, site="site-1", role="train", accepted=True)])
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=says):
        read_rounds(path)


def test_the_last_record_is_read_from_the_end_of_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert read_last(path) is None
    writer = RecordWriter(path)
    for number in range(2000):
        writer.write(RoundStarted(round=number))
    assert path.stat().st_size > 64 * 1024
    last = read_last(path)
    assert isinstance(last, RoundStarted) and last.round == 1999
    writer.write(JobDone(status="completed"))
    assert isinstance(read_last(path), JobDone)


def test_a_job_that_went_on_counts_each_round_once(tmp_path: Path) -> None:
    """What a server process had not finished when it ended is done again, and counts then."""
    writer = RecordWriter(tmp_path / "records.jsonl")
    for record in (
        JobRecord(job_id="1", sites=("site-1", "site-2")),
        RoundStarted(round=0),
        ContributionRecord(round=0, site="site-1", accepted=True),
        RoundDone(round=0, sites=("site-1",), missed={"site-2": "the site is gone"}),
        RoundStarted(round=1),
        ContributionRecord(round=1, site="site-2", accepted=False, reason="late"),
        Note(kind="site_died", site="site-1", text="site-1's FLARE job process ended"),
        Resumed(round=1),
        RoundStarted(round=1),
        ContributionRecord(round=1, site="site-1", accepted=True),
    ):
        writer.write(record)
    progress = JobProgress(writer.path, rounds=2)
    progress.read_new()
    event = progress.event()
    assert (event.round, event.answered, len(event.finished)) == (1, ("site-1",), 1)
    assert [note.partition(" ")[2] for note in event.notes] == [
        "site-1's FLARE job process ended",
        WENT_ON,
    ]
    writer.write(RoundDone(round=1, sites=("site-1",), missed={"site-2": "the site is gone"}))
    writer.write(JobDone(status="completed"))
    records, damaged = read_records(writer.path)
    history = History(records, {})
    assert (damaged, history.rounds_done, history.status) == (0, 2, "completed")
    rows = {(row.round, row.site): row.accepted for row in history.round_rows()}
    assert rows == {(0, "site-1"): True, (0, "site-2"): False} | {
        (1, "site-1"): True,
        (1, "site-2"): False,
    }
    assert history.answers.keys() == {(0, "site-1"), (1, "site-1")}  # none of the first attempt


def test_a_full_disk_holds_records_back_and_cuts_no_line(tmp_path: Path) -> None:
    """A limit on a file's size stands for the disk: it takes a part of a line, then no more."""
    writer = RecordWriter(tmp_path / "records.jsonl")
    writer.write_or_hold(RoundStarted(round=0))
    size = writer.path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
        with pytest.raises(OSError):
            writer.write_or_hold(RoundStarted(round=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert writer.path.stat().st_size == size
    assert [one.round for one in writer.held] == [1]
    writer.write_or_hold(RoundStarted(round=2))
    records, damaged = read_records(writer.path)
    assert [one.round for one in records] == [0, 1, 2] and damaged == 0
