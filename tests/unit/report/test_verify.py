"""`fedfms verify`: what a run says after it, and that no changed byte goes unnamed."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from job_writer import Job

import sealed_run
from fedfms import __version__
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.receipt import (
    CLIENTS,
    TRAINERS,
    Countersigned,
    SignedReceipt,
    report_sha256,
)
from fedfms.exchange.strategies import find_strategy
from fedfms.exchange.tensors import load_tensors, save_tensors
from fedfms.flare.receipts import KitSigner
from fedfms.flare.simulate import SERVER
from fedfms.kits.kit import read_kit
from fedfms.records.read import read_records
from fedfms.records.schema import ContributionRecord
from fedfms.report.verify import Check, verify_run
from fedfms.report.write import write_results
from fedfms.report.writer import without_writer, written_by
from fedfms.trainer.own_key import own_key
from sealed_run import JOB, SITES, make_kits, reseal, without_seal, write_run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def finished(kits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return write_run(folder / "run", kits, folder / "sites")


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def problems(checks: Sequence[Check]) -> list[str]:
    return [problem for check in checks for problem in check.problems]


def test_a_run_that_nobody_touched_holds_with_and_without_a_kit(
    run_folder: Path, kits: Path
) -> None:
    checks = verify_run(run_folder)
    assert problems(checks) == []
    assert len({check.what for check in checks}) == 10
    assert problems(verify_run(run_folder, read_kit(kits / "site-1"))) == []
    (note,) = [check.note for check in checks if check.note and check.looked]
    assert note.startswith(f"by {SERVER} on 20") and "certificate authority SHA256:" in note


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_every_changed_byte_of_the_records_is_named_by_its_line(
    run_folder: Path, kits: Path
) -> None:
    """Bytes drawn over the whole file, all those around line ends, and more of the seal."""
    path, kit = run_folder / "records.jsonl", read_kit(kits / "site-1")
    whole = path.read_bytes()
    drawn = random.Random(12)
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    seal = range(ends[-2] + 1, len(whole))
    places = {*drawn.sample(range(len(whole)), 60), *drawn.sample(seal, 60)}
    places |= {place + beside for place in ends for beside in (-1, 0, 1)} - {len(whole)}
    for place in sorted(places):
        path.write_bytes(whole)
        flip(path, place, drawn.randrange(8))
        line = whole.count(b"\n", 0, place) + 1
        named = " ".join(problems(verify_run(run_folder, kit)))
        assert re.search(rf"\bline {line}\b", named), (place, line, named)


@pytest.mark.parametrize(
    "name", ["global_model.safetensors", "recipe.json", f"pictures/{SITES[0]}-final-0.png"]
)
def test_every_changed_byte_of_a_file_of_the_result_is_named(run_folder: Path, name: str) -> None:
    path = run_folder / name
    whole = path.read_bytes()
    drawn = random.Random(name)
    for _ in range(12):
        path.write_bytes(whole)
        flip(path, drawn.randrange(len(whole)), drawn.randrange(8))
        assert f"{name} was changed after the run" in problems(verify_run(run_folder))
    path.unlink()
    assert f"{name} is missing" in problems(verify_run(run_folder))


@pytest.mark.parametrize("name", ["best_model.safetensors", f"pictures/{SITES[0]}-final-1.png"])
def test_a_file_that_was_put_in_after_the_run_is_named(run_folder: Path, name: str) -> None:
    source = name.replace("best", "global").replace("final-1", "final-0")
    shutil.copyfile(run_folder / source, run_folder / name)
    assert f"{name} was not there when the run ended" in problems(verify_run(run_folder))


def test_lines_that_are_taken_out_put_in_or_exchanged_are_named(run_folder: Path) -> None:
    path = run_folder / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for other, line in (
        (lines[:3] + lines[4:], 4),
        (lines[1:], 1),
        ([*lines[:3], lines[2], *lines[3:]], 4),
        ([*lines[:3], lines[4], lines[3], *lines[5:]], 4),
        ([*lines[:-2], lines[-1]], len(lines) - 1),
        (lines[:-1], len(lines) - 1),  # no seal
        ([*lines, lines[2]], len(lines) + 1),
    ):
        path.write_bytes(b"".join(other))
        named = problems(verify_run(run_folder))
        assert any(re.search(rf"\bline {line}\b", problem) for problem in named), (line, named)


def test_a_run_goes_on_after_its_seal_and_is_sealed_again(run_folder: Path, kits: Path) -> None:
    """As one that failed and was resumed: the first seal is a line like any other then."""
    from fedfms.flare.receipts import result_files
    from fedfms.records.schema import JobDone, Resumed
    from fedfms.records.write import RecordWriter

    writer = RecordWriter(run_folder / "records.jsonl")
    writer.write(Resumed(round=2))
    named = problems(verify_run(run_folder))
    assert any("the last, is no seal" in problem for problem in named)
    writer.write(JobDone(status="completed"))
    writer.seal(result_files(run_folder), KitSigner(kits / SERVER, "server"))
    assert problems(verify_run(run_folder)) == []


def test_a_canary_holds_though_its_model_is_not_kept(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(sealed_run.RECIPE, canary=True, rounds=1)
    monkeypatch.setattr(sealed_run, "RECIPE", recipe)
    monkeypatch.setattr(sealed_run.task_of, "__defaults__", (recipe,))
    folder = write_run(tmp_path / "canary", kits, tmp_path / "sites")
    (folder / "global_model.safetensors").unlink()
    reseal(folder, without_seal(folder), KitSigner(kits / SERVER, "server"))
    assert problems(verify_run(folder)) == []


# ------------------------------------------------- who could write another past, and what it lacks


def test_a_server_cannot_change_what_a_site_said(run_folder: Path, kits: Path) -> None:
    """It holds the key of the seal, and chains and seals all of it anew."""
    server, untouched = KitSigner(kits / SERVER, "server"), without_seal(run_folder)
    reseal(run_folder, untouched, server)
    assert problems(verify_run(run_folder)) == []

    changed = json.loads(json.dumps(untouched))
    answer = next(one for one in changed if one["record"] == "contribution")
    answer["contribution"]["loss"] = 0.25
    reseal(run_folder, changed, server)
    (named,) = problems(verify_run(run_folder))
    assert named.endswith("its receipt differs from it in report_sha256")
    assert "line 3 (contribution, of site-1, round 0)" in named

    changed = json.loads(json.dumps(untouched))
    answer = next(one for one in changed if one["record"] == "contribution")
    answer["receipt"]["signed"]["receipt"]["tensors_sha256"] = "0" * 64
    reseal(run_folder, changed, server)
    assert any(
        "the countersignature does not fit" in one for one in problems(verify_run(run_folder))
    )

    changed = json.loads(json.dumps(untouched))
    answer = next(one for one in changed if one["record"] == "contribution")
    del answer["receipt"]
    reseal(run_folder, changed, server)
    assert any("has no receipt" in one for one in problems(verify_run(run_folder)))

    changed = json.loads(json.dumps(untouched))
    for answer in changed:  # neither what it said nor its receipt
        if answer["record"] == "contribution" and answer["round"] == 1:
            answer.update(contribution=None, receipt=None)
    reseal(run_folder, changed, server)
    named = problems(verify_run(run_folder))
    assert sum("has no report that can be read" in one for one in named) == len(SITES)

    answers = [one for one in untouched if one["record"] == "contribution"]
    of_site_1 = [one for one in answers if one["site"] == "site-1"]
    changed = json.loads(json.dumps(untouched))
    for one in changed:  # the first round's answer as the second's
        if one["record"] == "contribution" and one["site"] == "site-1" and one["round"] == 1:
            one.update(contribution=of_site_1[0]["contribution"], receipt=of_site_1[0]["receipt"])
            one["contribution"]["round"] = 1
    reseal(run_folder, changed, server)
    assert any("differs from it in round" in one for one in problems(verify_run(run_folder)))


def test_a_server_cannot_pass_another_model_off_as_the_one_that_sites_scored(
    run_folder: Path, kits: Path
) -> None:
    path = run_folder / "global_model.safetensors"
    model = load_tensors(path)
    save_tensors(path, {name: tensor + 1e-6 for name, tensor in model.items()}, "fp32")
    reseal(run_folder, without_seal(run_folder), KitSigner(kits / SERVER, "server"))
    named = problems(verify_run(run_folder))
    assert named == [
        f"global_model.safetensors is not the final model that {site} scored" for site in SITES
    ]


def test_a_site_cannot_seal_and_another_project_is_not_yours(
    run_folder: Path, kits: Path, tmp_path: Path
) -> None:
    kit = read_kit(kits / "site-2")
    reseal(run_folder, without_seal(run_folder), KitSigner(kits / "site-1", "client"))
    (named,) = problems(verify_run(run_folder, kit))
    assert "site-1 signed it, and the server is localhost" in named

    theirs = make_kits(tmp_path / "theirs")
    other = write_run(tmp_path / "other", theirs, tmp_path / "their-sites")
    assert problems(verify_run(other)) == []  # whole in itself: the fingerprint is compared
    named = problems(verify_run(other, kit))
    assert any("another certificate authority than your kit" in one for one in named)
    assert any("its certificate is not site-1's" in one for one in named)


# --------------------------------------------------------------------------------- the averages

AVERAGES = "the averages, from the answers"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A run whose answers were kept."""

    run: Path
    answers: Path
    server: KitSigner

    def named(self) -> list[str]:
        """What the check of averages finds."""
        (check,) = [one for one in verify_run(self.run, None, self.answers) if one.what == AVERAGES]
        assert check.looked
        return list(check.problems)

    def answer(self, number: int, site: str) -> Path:
        return self.answers / f"round-{number:04d}" / f"{site}.safetensors"


@pytest.fixture(scope="module")
def finished_and_kept(kits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    write_run(folder / "run", kits, folder / "sites", folder / "answers")
    return folder


@pytest.fixture
def kept(finished_and_kept: Path, kits: Path, tmp_path: Path) -> Kept:
    """A copy to be changed."""
    run = shutil.copytree(finished_and_kept / "run", tmp_path / "run")
    answers = shutil.copytree(finished_and_kept / "answers", tmp_path / "answers")
    return Kept(Path(run), Path(answers), KitSigner(kits / SERVER, "server"))


def test_rounds_closed_again_come_to_the_models_of_the_run(kept: Kept) -> None:
    checks = verify_run(kept.run, None, kept.answers)
    assert problems(checks) == []
    assert [one.note for one in checks if one.what == AVERAGES] == ["4 answers of 2 rounds"]
    judged = [one for one in without_seal(kept.run) if one["record"] == "judged"]
    assert judged[1]["sites"][1]["findings"] == ["norm"]  # so a factor is part of the average
    shutil.copytree(kept.answers, kept.run / "answers")
    assert problems(verify_run(kept.run)) == []  # found there


@pytest.mark.parametrize("strategy", ["server_momentum", "server_adam"])
def test_a_strategy_that_remembers_is_replayed_and_another_one_is_named(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    recipe = dataclasses.replace(
        sealed_run.RECIPE, strategy=strategy, rounds=3, weigh_by="cases", best_by="worst"
    )
    monkeypatch.setattr(sealed_run, "RECIPE", recipe)
    run = write_run(tmp_path / "run", kits, tmp_path / "sites", tmp_path / "answers")
    assert problems(verify_run(run, None, tmp_path / "answers")) == []
    other = find_strategy(dataclasses.replace(recipe, server_momentum=0.5))
    monkeypatch.setattr(sealed_run, "find_strategy", lambda recipe: other)
    run = write_run(tmp_path / "other", kits, tmp_path / "elsewhere", tmp_path / "kept")
    named = problems(verify_run(run, None, tmp_path / "kept"))
    assert any("began with another model than what the answers of round" in one for one in named)


@pytest.mark.parametrize(("number", "site"), [(0, "site-1"), (1, "site-2")])
def test_every_changed_byte_of_an_answer_is_named_by_round_and_site(
    kept: Kept, number: int, site: str
) -> None:
    path = kept.answer(number, site)
    whole = path.read_bytes()
    drawn = random.Random(f"{number} {site}")
    for place in drawn.sample(range(len(whole)), 40):
        path.write_bytes(whole)
        flip(path, place, drawn.randrange(8))
        assert any(one.startswith(f"round {number}, {site}: ") for one in kept.named()), place
    path.unlink()
    assert kept.named()[0] == f"round {number}, {site}: its answer was not kept"


def test_another_answer_in_the_place_of_one_is_named_though_its_file_is_whole(kept: Kept) -> None:
    path = kept.answer(1, "site-1")
    before = load_tensors(path)
    for other in (
        load_tensors(kept.answer(0, "site-1")),
        {name: tensor * (1 + 2**-20) for name, tensor in before.items()},
    ):
        save_tensors(path, other, None)
        assert kept.named() == [
            "round 1, site-1: what was kept is not the answer of its receipt",
            "the rounds after that, and the models, could not be computed again",
        ]
    save_tensors(path, before, None)
    save_tensors(kept.answer(1, "site-3"), before, None)
    assert kept.named() == ["round 1: site-3.safetensors is no answer that was accepted"]


def test_every_changed_byte_of_the_start_model_is_named_and_so_is_another_one(kept: Kept) -> None:
    path = kept.answers / "start_model.safetensors"
    whole = path.read_bytes()
    drawn = random.Random(3)
    for place in drawn.sample(range(len(whole)), 40):
        path.write_bytes(whole)
        flip(path, place, drawn.randrange(8))
        assert any("start_model.safetensors" in one for one in kept.named()), place
    path.write_bytes(whole)
    model = load_tensors(path)
    save_tensors(path, {name: tensor + 1e-6 for name, tensor in model.items()}, "fp32")
    assert kept.named() == [
        "round 0: site-1, site-2 began with another model than start_model.safetensors",
        "round 1: site-1, site-2 began with another model than what the answers of round 0 come to",
        "global_model.safetensors is not what the answers of 2 rounds come to",
    ]


def test_a_weight_a_verdict_or_a_model_that_the_server_changed_is_named(kept: Kept) -> None:
    """It holds the key of the seal, and chains and seals all of it anew."""
    untouched = without_seal(kept.run)

    changed = json.loads(json.dumps(untouched))
    for one in changed:
        if (one["record"], one.get("site"), one.get("round")) == ("contribution", "site-1", 1):
            one["contribution"]["training_slices"] = 6
    reseal(kept.run, changed, kept.server)
    named = problems(verify_run(kept.run, None, kept.answers))
    assert any("of site-1, round 1): its receipt differs from it in report" in one for one in named)
    assert any(one.startswith("round 1, site-1: the guard finds another ") for one in named)

    for field, value in (("factor", 0.25), ("counted_slices", 70), ("findings", []), ("norm", 9.0)):
        changed = json.loads(json.dumps(untouched))
        for one in changed:
            if (one["record"], one.get("round")) == ("judged", 1):
                one["sites"][1][field] = value
        reseal(kept.run, changed, kept.server)
        named = kept.named()
        assert named[0] == f"round 1, site-2: the guard finds another {field}"
        if field in ("factor", "counted_slices"):
            assert "global_model.safetensors is not what the answers of 2 rounds come to" in named

    changed = [one for one in untouched if (one["record"], one.get("round")) != ("judged", 0)]
    reseal(kept.run, changed, kept.server)
    assert kept.named()[0] == "round 0: no record says what the guard found"

    model = load_tensors(kept.run / "global_model.safetensors")
    name = sorted(model)[0]
    model[name] = model[name].clone()
    model[name].view(-1).view(torch.int32)[0] ^= 1  # the last bit of one value
    save_tensors(kept.run / "global_model.safetensors", model, "fp32")
    reseal(kept.run, untouched, kept.server)
    assert kept.named() == ["global_model.safetensors is not what the answers of 2 rounds come to"]


def test_averages_that_cannot_be_checked_are_said_not_to_be(
    kept: Kept, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(run: Path, answers: Path | None = None) -> str:
        (check,) = [one for one in verify_run(run, None, answers) if one.what == AVERAGES]
        assert (check.problems, check.looked) == ((), False)
        return check.note

    assert why(kept.run) == "not kept, averages not checked"
    changed = without_seal(kept.run)
    changed[0]["answers_kept"] = True
    reseal(kept.run, changed, kept.server)
    assert f"in answers/{JOB}; name a copy of that folder with --answers" in why(kept.run)
    (check,) = [one for one in verify_run(kept.run, None, tmp_path / "no") if one.what == AVERAGES]
    assert "there is no folder" in check.problems[0]

    recipe = dataclasses.replace(sealed_run.RECIPE, secure_sum=True)
    monkeypatch.setattr(sealed_run, "RECIPE", recipe)
    monkeypatch.setattr(sealed_run.task_of, "__defaults__", (recipe,))
    sums = write_run(tmp_path / "sums", kits, tmp_path / "sites")
    assert "secure sums: the server had no answer of a single site" in why(sums, kept.answers)


# ------------------------------------------------------------------------------------- tables, cli


def test_a_results_folder_holds_and_a_changed_table_is_named(
    finished: Path, tmp_path: Path
) -> None:
    write_results(finished, tmp_path / "results")
    assert problems(verify_run(tmp_path / "results")) == []
    for name, column in (("rounds.csv", "loss"), ("evaluation.csv", "mean")):
        path = tmp_path / "results" / name
        before = path.read_text()
        head, first, *rest = before.splitlines()
        cells = first.split(",")
        cells[head.split(",").index(column)] = "0.75"
        path.write_text("\n".join([head, ",".join(cells), *rest]) + "\n")
        (named,) = problems(verify_run(tmp_path / "results"))
        assert f"{name}, line 2, site-1: {column} is 0.75, and 0.3" in named
        path.write_text(before)


def test_a_changed_figure_of_the_guard_or_of_the_summary_is_named(
    run_folder: Path, kits: Path, tmp_path: Path
) -> None:
    from fedfms.contracts.verdict import Verdict
    from fedfms.records.schema import Judged

    found = Verdict(
        site="site-1", norm=2.5, usual_norm=0.5, cosine=0.25, slices=7, counted_slices=7, factor=0.1
    )
    judged = Judged(round=0, acts=True, sites=(found,)).model_dump(mode="json")
    records = without_seal(run_folder)
    reseal(run_folder, [*records[:4], judged, *records[4:]], KitSigner(kits / SERVER, "server"))
    results = tmp_path / "results"
    write_results(run_folder, results)
    assert problems(verify_run(results)) == []

    path = results / "guard.csv"
    before = path.read_text()
    path.write_text(before.replace("2.5", "0.5"))
    (named,) = problems(verify_run(results))
    assert "guard.csv, line 2, site-1: norm is 0.5, and 2.5 in records.jsonl" in named
    path.unlink()
    assert problems(verify_run(results)) == ["guard.csv has 0 rows, and the records have 1"]
    path.write_text(before)

    path = results / "summary.json"
    summary = json.loads(path.read_text())
    summary["parts"][0]["dice"]["final"]["mean"] = 0.9
    path.write_text(json.dumps(summary))
    assert problems(verify_run(results)) == [
        "summary.json: parts is not what records.jsonl comes to"
    ]


@pytest.fixture(scope="module")
def reported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with its report."""
    folder = tmp_path_factory.mktemp("reported") / "results"
    write_results(finished, folder)
    return folder


@pytest.fixture
def results(reported: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(reported, tmp_path / "results"))


def test_a_report_that_was_changed_or_is_gone_is_named_and_one_that_was_made_again_is_not(
    results: Path, run: Run
) -> None:
    assert run("report", results)[0] == 0
    assert problems(verify_run(results)) == []
    for name in ("report.html", "report.md"):
        path = results / name
        before = path.read_text()
        assert written_by() in before
        for changed in (before.replace("Dice", "DICE-9.99", 1), before + "\nWinner: 0.999\n"):
            path.write_text(changed)
            assert problems(verify_run(results)) == [
                f"{name} is not what records.jsonl comes to: it was changed"
            ]
        path.unlink()
        assert problems(verify_run(results)) == [f"{name} is missing"]
        path.write_text(before)


def test_a_report_of_another_version_is_not_compared_and_that_is_said(
    results: Path, run_folder: Path, kits: Path, tmp_path: Path
) -> None:
    def reports(folder: Path) -> Check:
        (check,) = [one for one in verify_run(folder) if one.what.startswith("the report")]
        return check

    path = results / "report.md"
    whole = path.read_text()
    path.write_text(whole.replace(written_by(), "fedfms 0.0.9, report 0123456789ab") + "\n")
    check = reports(results)
    assert (check.problems, check.looked) == ((), False)
    assert "report.md was written by fedfms 0.0.9, report 0123456789ab, and this is" in check.note
    path.write_text(without_writer(whole))  # as before reports said it: compared all the same
    assert reports(results) == dataclasses.replace(check, looked=True, note="")

    for version, looked in (("0.0.9", False), (__version__, True)):  # of the server, by the records
        records = without_seal(run_folder)
        records[0]["fedfms_version"] = version
        reseal(run_folder, records, KitSigner(kits / SERVER, "server"))
        write_results(run_folder, tmp_path / version)
        (tmp_path / version / "report.html").write_text("of an earlier version, or junk")
        check = reports(tmp_path / version)
        assert (check.looked, bool(check.problems)) == (looked, looked)
        assert "does not say which fedfms wrote it" in " ".join([check.note, *check.problems])


def test_a_summary_that_is_gone_or_says_more_or_less_is_named(results: Path) -> None:
    path = results / "summary.json"
    whole = path.read_text()
    for change, named in (
        (lambda one: one.update(extra={}), "summary.json: extra is nothing that a summary has"),
        (lambda one: one["sites"]["site-1"].update(note="best"), "summary.json: sites is not what"),
        (lambda one: one["dice"]["final"].update(mean=0.9), "summary.json: dice is not what"),
        (
            lambda one: one["files"].pop("recipe.json"),
            "summary.json: files does not name recipe.json, which is there",
        ),
        (
            lambda one: one["files"].update({"a.txt": one["files"]["recipe.json"]}),
            "summary.json: files names a.txt, which is not there",
        ),
        (lambda one: one["files"]["recipe.json"].update(bytes=1), "what it is not"),
    ):
        summary = json.loads(whole)
        change(summary)
        path.write_text(json.dumps(summary))
        (one,) = problems(verify_run(results))
        assert named in one
    path.write_text(json.dumps(json.loads(whole) | {"format": 2}))
    (check,) = [one for one in verify_run(results) if one.what.startswith("the tables")]
    assert not check.looked and "summary.json is of format 2" in check.note
    path.unlink()
    for name in ("rounds.csv", "evaluation.csv"):
        (results / name).write_text("junk")
    (one,) = problems(verify_run(results))
    assert one.startswith("summary.json is missing, and rounds.csv, evaluation.csv, report.html")


def test_a_summary_of_an_earlier_version_that_lacks_what_is_nothing_here_holds(
    results: Path,
) -> None:
    path = results / "summary.json"
    summary = json.loads(path.read_text())
    for site in summary["sites"].values():
        assert site.pop("left_out") == 0
        assert site.pop("left_out_by_reason") == {}
    path.write_text(json.dumps(summary))
    assert problems(verify_run(results)) == []
    for site in summary["sites"].values():
        del site["cases"]
    path.write_text(json.dumps(summary))
    assert problems(verify_run(results)) != []


def test_a_file_that_nothing_names_is_named(results: Path) -> None:
    (results / "new_model.safetensors").write_bytes(b"x")
    (results / "more").mkdir()
    (results / "more" / "notes.txt").write_text("mine")
    assert problems(verify_run(results)) == [
        f"{name}: nothing of the run names this file; if it is yours, keep it elsewhere"
        for name in ("more/notes.txt", "new_model.safetensors")
    ]


def test_a_fetched_result_without_tables_is_said_to_have_none(run_folder: Path) -> None:
    checks = {one.what: one for one in verify_run(run_folder)}
    for what in ("the tables, from the records", "the report, from the records"):
        assert not checks[what].looked
        assert "as it was fetched, or all of them were taken out" in checks[what].note


# --------------------------------------------------------------------------- keys of the trainers

KEYS = "the keys of the trainers"


def keys_of(folder: Path, peers: dict[str, str] | None = None) -> Check:
    (check,) = [one for one in verify_run(folder, peers=peers) if one.what == KEYS]
    return check


def own_keys(folder: Path) -> dict[str, str]:
    """Of the sites that really answered, as their trainers say them."""
    sites = folder.parent / "sites"
    return {name: own_key(sites / name / "work").public for name in SITES}


def forge(records: list[dict], kits: Path, folder: Path, rounds: Sequence[int]) -> None:
    """What a coordinator can do who makes kits: other scores of site-1, by a trainer made up."""
    signer, trainer = KitSigner(kits / "site-1", "client"), own_key(folder)
    previous = None
    for one in records:
        if one["record"] != "contribution" or one["site"] != "site-1":
            continue
        receipt = Countersigned.from_dict(one["receipt"]).signed.receipt
        if one["round"] in rounds:
            one["contribution"]["metrics"][0]["mean"] = 0.99
            said = report_sha256(Contribution.from_dict(one["contribution"]))
            receipt = dataclasses.replace(receipt, report_sha256=said)
            receipt = dataclasses.replace(receipt, previous=previous or receipt.previous)
            signed = SignedReceipt(
                receipt=receipt,
                key=trainer.public,
                signature=trainer.sign(TRAINERS + receipt.canonical),
            )
            other = Countersigned(
                signed=signed,
                certificate=signer.certificate,
                signature=signer.sign(CLIENTS + signed.canonical),
            )
            one["receipt"] = other.to_dict()
        previous = receipt.sha256


def test_the_keys_of_the_trainers_are_told_and_compared_where_the_sites_said_theirs(
    finished: Path,
) -> None:
    keys = own_keys(finished)
    check = keys_of(finished)
    assert (check.problems, check.warnings, check.looked) == ((), (), False)
    lines = check.note.splitlines()
    assert lines[:2] == [f"{site}: {keys[site]}" for site in SITES]
    assert lines[2].startswith("compared with nothing that a site said") and "--peers" in lines[2]
    assert keys_of(finished, keys) == Check(KEYS, (), "\n".join(lines[:2]))
    (named,) = keys_of(finished, {"site-1": keys["site-1"]}).warnings
    assert named == "site-2 is not in the file of --peers: its key was compared with nothing"


def test_a_coordinator_who_rewrites_what_a_site_sent_has_not_its_key(
    run_folder: Path, finished: Path, kits: Path, tmp_path: Path
) -> None:
    """It holds the seal's key and can issue certificates; all but the trainers' keys fits."""
    keys, server = own_keys(finished), KitSigner(kits / SERVER, "server")
    untouched = without_seal(run_folder)
    records = json.loads(json.dumps(untouched))
    forge(records, kits, tmp_path / "made-up", [0, 1])
    reseal(run_folder, records, server)
    made_up = own_key(tmp_path / "made-up").public
    assert problems(verify_run(run_folder)) == []  # so that is said, and the key is told:
    check = keys_of(run_folder)
    assert f"site-1: {made_up}, from round 0 on" in check.note
    assert "site-1, the evaluation of the final model: another key" in check.warnings[0]
    named = keys_of(run_folder, keys).problems
    assert len(named) == 1 and named[0].startswith("site-1, round 0: its receipts are signed by")
    assert made_up in named[0] and keys["site-1"] in named[0]

    records = json.loads(json.dumps(untouched))
    forge(records, kits, tmp_path / "made-up", [1])  # one answer of several
    reseal(run_folder, records, server)
    check = keys_of(run_folder)
    assert check.warnings[0].startswith("site-1, round 1: another key of its trainer signs")
    (named_one,) = check.problems
    assert "site-1, the evaluation of the final model: a key that it had given up" in named_one


def test_the_command_compares_keys_and_warns(
    run: Run, run_folder: Path, finished: Path, kits: Path, tmp_path: Path
) -> None:
    keys, peers = own_keys(finished), tmp_path / "peers.json"
    code, out, _ = run("verify", run_folder)
    assert code == 0 and "SKIP the keys of the trainers\n     site-1: " in out
    assert "--peers" in out
    peers.write_text(json.dumps(keys))
    code, out, _ = run("verify", run_folder, "--peers", peers)
    assert code == 0 and "PASS the keys of the trainers" in out and keys["site-2"] in out
    peers.write_text(json.dumps({"site-1": keys["site-1"]}))
    code, out, _ = run("verify", run_folder, "--peers", peers)
    assert code == 0 and "WARN the keys of the trainers" in out and "site-2 is not in" in out
    peers.write_text(json.dumps(keys | {"site-2": keys["site-1"]}))
    code, out, _ = run("verify", run_folder, "--peers", peers)
    assert code == 1 and "FAIL the keys of the trainers" in out
    for text in ("no json", '{"site-1": "short"}'):
        peers.write_text(text)
        code, _, err = run("verify", run_folder, "--peers", peers)
        assert code == 1 and "peers.json" in err and "fix:" in err


def test_records_from_before_there_were_chains_are_read_and_cannot_be_verified(
    tmp_path: Path,
) -> None:
    folder = Job().write(tmp_path / "old")
    assert read_records(folder / "records.jsonl")[1] == 0
    checks = {check.what: check.problems for check in verify_run(folder)}
    (why,) = checks["records.jsonl, line by line"]
    assert "a version of fedfms that made no chain, and cannot be verified" in why
    assert checks["the recipe as it ran"] == ()


def test_what_is_read_of_a_run_says_nothing_of_chain_or_seal(finished: Path) -> None:
    records, damaged = read_records(finished / "records.jsonl")
    assert damaged == 0
    assert records[-1].record == "job_done"
    answers = [one for one in records if isinstance(one, ContributionRecord)]
    assert isinstance(answers[0].said, Contribution)
    assert dataclasses.asdict(answers[0].said)["loss"] == 1 / 3
    assert answers[0].receipt is not None
    assert answers[0].receipt["signed"]["receipt"]["job"] == JOB


def test_the_command_says_what_holds_and_ends_with_1_where_something_does_not(
    run: Run, run_folder: Path, kits: Path
) -> None:
    code, out, _ = run("verify", run_folder, "--kit", kits / "site-1")
    assert (code, out.count("PASS"), out.count("FAIL"), out.count("SKIP")) == (0, 6, 0, 4)
    assert "SKIP the averages, from the answers\n     not kept, averages not checked" in out
    assert "certificate authority SHA256:" in out
    flip(run_folder / "global_model.safetensors", 200, 3)
    code, out, _ = run("verify", run_folder)
    assert code == 1
    assert "FAIL the files of the result\n     global_model.safetensors was changed" in out
    code, out, _ = run("verify", run_folder, "--json")
    found = {one["what"]: one["problems"] for one in json.loads(out)}
    assert code == 1
    assert found["the files of the result"] == [
        "global_model.safetensors was changed after the run"
    ]
    code, _, err = run("verify", run_folder / "pictures")
    assert code == 1 and "holds no records.jsonl" in err
