"""What a person who watches sees of each site: from records, and from what sites say meanwhile."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from fedfms.contracts.codes import CODES
from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.decode import Misfits
from fedfms.contracts.now import PHASE_WORDS, WORST_FIRST, SiteNow, SiteProgress
from fedfms.flare import report_now, sentences
from fedfms.flare.live import SILENT_SECONDS, Live
from fedfms.flare.progress import Event, JobProgress
from fedfms.flare.report_now import Reporter
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobRecord,
    Note,
    Record,
    Resumed,
    RoundDone,
    RoundStarted,
)

SITES = ("site-1", "site-2", "site-3")
DIED = "TrainerError (trainer-died); the site's own log has the details"
AT = 1_000_000.0  # when the round of these tests began


def said(site: str, number: int = 0, dice: float = 0.5) -> Contribution:
    return Contribution(
        site=site,
        kind="train",
        role="train",
        round=number,
        model="round",
        recipe_sha256="0" * 64,
        backbone_sha256="0" * 64,
        package_version="1",
        training_slices=10,
        training_cases=5,
        evaluated_cases=2,
        metrics=(Metric(class_name="a", metric="dice", mean=dice, std=0.0, cases=2, empty=0),),
        loss=0.25,
        seconds={"prepare": 1.0, "evaluate": 3.0, "train": 16.0},
        peak_memory_bytes={"evaluate": 5, "train": 9},
    )


class Run:
    """A job's records as its server writes them, and what its sites say."""

    def __init__(self, folder: Path, rounds: int = 4) -> None:
        self.path = folder / "records.jsonl"
        self.rounds = rounds
        self.live = Live()
        self.write(JobRecord(sites=SITES), 0)

    def write(self, record: Record, seconds: float) -> None:
        timed = record.model_copy(update={"time": AT + seconds})
        with self.path.open("a") as file:
            file.write(timed.model_dump_json(exclude_none=True) + "\n")

    def answer(self, site: str, number: int, seconds: float, reason: str | None = None) -> None:
        self.write(
            ContributionRecord(
                round=number,
                site=site,
                accepted=reason is None,
                reason=reason,
                bytes_down=100,
                bytes_up=50,
                contribution=None if reason else said(site, number),
            ),
            seconds,
        )

    def event(self, seconds: float) -> Event:
        reader = JobProgress(self.path, self.rounds)
        reader.read_new()
        event = reader.event(now=AT + seconds, live=self.live.snapshot())
        sent = Event.from_dict(json.loads(json.dumps(event.to_dict())))
        assert sent == event  # as another machine gets it
        return sent

    def now(self, seconds: float) -> dict[str, SiteNow]:
        return {one.name: one for one in self.event(seconds).now}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def told(phase: str, done: int = 0, total: int = 0, **more: object) -> SiteProgress:
    return SiteProgress.from_dict(
        {"kind": "train", "round": 0, "phase": phase, "done": done, "total": total, **more}
    )


def test_a_site_is_followed_through_a_round(run: Run) -> None:
    run.write(RoundStarted(round=0), 0)
    assert run.now(1)["site-1"].phase == "waits"
    run.live.task_sent("site-1", "train", 0, AT + 1)
    assert (run.now(2)["site-1"].phase, run.now(2)["site-1"].since) == ("download", AT + 1)
    run.live.progress("site-1", told("start"), AT + 5)
    run.live.progress("site-1", told("train", 0, 120), AT + 6)
    run.live.progress("site-1", told("train", 40, 120, gpu="present"), AT + 26)
    one = run.now(27)["site-1"]
    assert (one.phase, one.done, one.total, one.since) == ("train", 40, 120, AT + 6)
    assert (one.heard, one.connected, one.gpu) == (AT + 26, True, "present")
    run.live.progress("site-1", told("upload"), AT + 66)
    assert run.now(67)["site-1"].phase == "upload"
    run.live.answer_came("site-1", AT + 70)
    run.answer("site-1", 0, 70)
    one = run.now(72)["site-1"]
    assert (one.phase, one.since, one.done) == ("answered", AT + 70, 0)
    assert one.pace["download"], one.pace["upload"] == (4, 4)
    assert (one.pace["round"], one.pace["train"]) == (69, 16)
    assert (one.dice, one.loss, one.bytes_down, one.bytes_up) == (0.5, 0.25, 100, 50)
    assert one.peak_memory == 9
    run.live.progress("site-1", told("upload"), AT + 73)  # that was on its way for long
    assert run.now(74)["site-1"].phase == "answered"


def test_a_failure_shows_at_once_and_is_gone_when_the_site_works_again(run: Run) -> None:
    run.write(RoundStarted(round=0), 0)
    run.answer("site-2", 0, 9, DIED)
    event = run.event(10)
    one = {site.name: site for site in event.now}["site-2"]
    assert (one.phase, one.missed) == ("failed", 0)
    assert one.failure is not None and one.failure.startswith(CODES["trainer-died"])
    assert "; fix: " in one.failure
    assert event.missed == (f"site-2 failed in round 0: {one.failure}",)
    assert event.worst_first[0] == one
    run.answer("site-1", 0, 20)
    run.write(RoundDone(round=0, sites=("site-1",), missed={"site-2": DIED, "site-3": "x"}), 21)
    assert run.event(22).missed[0] == event.missed[0]  # the same sentence, to be said once
    assert run.event(22).missed[1].startswith("site-3 missed round 0: x")
    run.write(RoundStarted(round=1), 23)
    assert run.now(24)["site-2"].failure == one.failure
    run.live.task_sent("site-2", "train", 1, AT + 24)
    assert (run.now(25)["site-2"].failure, run.now(25)["site-2"].missed) == (None, 1)


def test_a_site_that_is_gone_is_seen_by_its_silence_and_by_the_servers_word(run: Run) -> None:
    run.write(RoundStarted(round=0), 0)
    run.live.heart_beats({"site-1": AT + 1, "site-2": AT + 1})
    run.live.task_sent("site-1", "train", 0, AT + 1)
    run.live.task_sent("site-2", "train", 0, AT + 1)
    later = SILENT_SECONDS + 2
    run.live.heart_beats({"site-2": AT + later})
    gone = run.now(later)["site-1"]
    assert (gone.phase, gone.connected, gone.heard) == ("gone", False, AT + 1)
    assert run.now(later)["site-2"].phase == "download"
    note = "site-2's FLARE job process ended (exit code 101, killed); it is started again"
    run.write(Note(kind="site_died", site="site-2", text=note), later)
    assert (run.now(later + 1)["site-2"].phase, run.now(later + 1)["site-2"].failure) == (
        "gone",
        note,
    )
    run.live.task_sent("site-2", "train", 0, AT + later + 4)  # it came back for its task
    run.live.heart_beats({"site-2": AT + later + 4})
    assert run.now(later + 5)["site-2"].phase == "download"


def test_a_server_that_went_on_asks_all_sites_again(run: Run) -> None:
    run.write(RoundStarted(round=0), 0)
    run.answer("site-1", 0, 10)
    run.answer("site-2", 0, 11, DIED)
    run.write(Resumed(round=0), 60)
    run.write(RoundStarted(round=0), 61)
    event = run.event(62)
    assert {one.phase for one in event.now} == {"waits"}
    assert event.missed == ()
    assert event.began == AT + 61


def test_a_run_that_waits_says_for_whom_and_gives_no_time(run: Run) -> None:
    run.write(RoundStarted(round=0), 0)
    run.write(RoundDone(round=0, sites=SITES), 20)
    run.write(RoundStarted(round=1), 20)
    assert run.event(25).left is not None
    run.write(Note(kind="waits", text="the run waits: it needs 2 sites"), 30)
    event = run.event(31)
    assert (event.left, event.waits) == (None, "the run waits: it needs 2 sites")
    run.write(Note(kind="goes_on", text="enough sites are there again"), 90)
    assert run.event(91).waits is None and run.event(91).left is not None


def test_a_run_that_stopped_early_has_as_many_rounds_as_it_had(run: Run) -> None:
    run.write(RoundStarted(round=0), 0)
    for site in SITES:
        run.answer(site, 0, 10)
    assert (run.event(11).phase, run.event(11).rounds) == ("train", run.rounds)
    run.write(Note(kind="stopped_early", text="training ends with round 0"), 11)
    run.write(RoundDone(round=0, sites=SITES), 12)
    event = run.event(13)
    assert run.rounds > 1 and (event.phase, event.rounds) == ("evaluate", 1)
    assert any("training ends with round 0" in note for note in event.notes)
    run.write(Resumed(round=1), 20)  # the server's process started again
    assert (run.event(21).phase, run.event(21).rounds) == ("evaluate", 1)


def test_the_final_evaluation_is_followed_too(run: Run) -> None:
    for number in range(4):
        run.write(RoundStarted(round=number), 20 * number)
        run.answer("site-1", number, 20 * number + 19)
        run.write(RoundDone(round=number, sites=("site-1",)), 20 * number + 20)
    run.live.task_sent("site-1", "evaluate", 0, AT + 81)
    run.live.progress("site-1", told("evaluate", 3, 12, kind="evaluate", round=4), AT + 82)
    event = run.event(83)
    one = next(site for site in event.now if site.name == "site-1")
    assert (event.phase, one.phase, one.share) == ("evaluate", "evaluate", 0.25)
    assert event.left is not None and 0 < event.left[1] < 20
    run.live.answer_came("site-1", AT + 84)
    run.write(EvaluationRecord(site="site-1", model="final", contribution=said("site-1")), 84)
    run.write(EvaluationRecord(site="site-2", model="final", reason=DIED), 85)
    assert [run.now(86)[name].phase for name in SITES] == ["answered", "failed", "waits"]


@pytest.mark.parametrize(
    "values",
    [
        None,
        "train",
        {},
        {"kind": "train", "round": 0, "phase": "lunch"},
        {"kind": "train", "round": -1, "phase": "train"},
        {"kind": "train", "round": 0, "phase": "train", "done": "/data/anna.nii"},
        {"kind": "train", "round": 0, "phase": "train", "gpu": "anna"},
    ],
)
def test_a_site_can_say_nothing_but_numbers_and_known_words(values: object) -> None:
    with pytest.raises(Misfits):
        SiteProgress.from_dict(values)


def test_what_a_later_version_adds_is_passed_over() -> None:
    said_later = {"kind": "train", "round": 0, "phase": "train", "done": 1, "mood": "good"}
    assert SiteProgress.from_dict(said_later).done == 1


def test_a_site_that_takes_no_part_is_not_listened_to() -> None:
    live = Live()
    live.progress("stranger", told("train", 1, 2), AT)
    assert live.snapshot() == {}


def test_every_phase_has_a_word_and_a_place() -> None:
    assert set(PHASE_WORDS) == set(WORST_FIRST)
    assert len(WORST_FIRST) == len(set(WORST_FIRST))


def test_every_sentence_is_about_a_code_that_exists() -> None:
    assert set(sentences._BY_CODE) <= set(CODES)
    for code in CODES:
        text = sentences.failure(f"TrainerError ({code}); the site's own log has the details", "s")
        assert CODES[code] in text and "; fix: " in text
    assert "logs site-7-trainer)" in sentences.failure("TrainerError (trainer)", "site-7")
    assert sentences.failure("ContributionRefused (too-large): a norm of 9", "s").startswith(
        "the server refused what it sent: the change is larger"
    )
    for reason in (None, "", sentences.LATE, sentences.GONE, "EXECUTION_EXCEPTION", "what?"):
        assert "; fix: " in sentences.failure(reason, "s")


@pytest.mark.parametrize(
    ("reason", "problem", "fix"),
    [
        ("no room; fix: free some", "no room", "free some"),
        ("Aborting job due to deployment policy violation", "fewer sites", "min_clients"),
        (
            "Aborted job 1 due to fatal return code UNSAFE_JOB from client site-2",
            "site-2's FLARE client answered UNSAFE_JOB",
            "ask site-2",
        ),
        ("FLARE says FINISHED:ABNORMAL", "FINISHED:ABNORMAL", "docker compose logs server"),
        ("FLARE says FINISHED:ABANDONED", "FINISHED:ABANDONED", "submit it again"),
        ("Exception in workflow train: x", "Exception in workflow", "docker compose logs server"),
    ],
)
def test_the_end_of_a_job_says_what_to_do(reason: str, problem: str, fix: str) -> None:
    said = sentences.end(reason)
    assert problem in said[0] and fix in said[1]


# ------------------------------------------------------------------------------ at the site


def test_a_line_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    hangs = threading.Event()
    started = time.monotonic()
    with Reporter(lambda now: hangs.wait(20), tmp_path, told("start")) as reporter:
        for step in range(1000):
            reporter.on_progress("train", step, 1000)
        reporter.sends_answer()
    assert time.monotonic() - started < 2
    hangs.set()


def test_a_line_that_fails_is_tried_again(tmp_path: Path) -> None:
    heard: list[SiteProgress] = []

    def send(now: SiteProgress) -> None:
        heard.append(now)
        raise ConnectionError

    with Reporter(send, tmp_path, told("start")) as reporter:
        reporter.on_progress("prepare", 1, 4)
        time.sleep(0.6)
        reporter.on_progress("a new word", 1, 4)
        reporter.on_progress("train", 2, 120)
        time.sleep(0.6)
        reporter.sends_answer()
    deadline = time.monotonic() + 5
    while heard[-1].phase != "upload" and time.monotonic() < deadline:
        time.sleep(0.05)
    phases = list(dict.fromkeys(one.phase for one in heard))
    assert phases[-3:] == ["prepare", "train", "upload"]
    assert (2, 120) in [(one.done, one.total) for one in heard]


def test_many_steps_are_few_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_now, "STEP_SECONDS", 0.5)
    heard: list[SiteProgress] = []
    with Reporter(heard.append, tmp_path, told("start")) as reporter:
        for step in range(200):
            reporter.on_progress("train", step, 200)
            time.sleep(0.01)
    assert 2 <= len(heard) <= 8
    assert [one.done for one in heard] == sorted(one.done for one in heard)
