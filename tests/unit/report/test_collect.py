import csv
import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
from job_writer import BYTES_DOWN, BYTES_UP, CASES, RECIPE, Job, dice_of

from fedfms.contracts.contribution import METRICS
from fedfms.errors import FederationError
from fedfms.records.history import NOT_ANNOTATED, WITHHELD
from fedfms.report.collect import collect, load_result, summary_table


@pytest.fixture(scope="module")
def job():
    return Job()


@pytest.fixture(scope="module")
def result(job, tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    return collect(job.write(root / "job"), root / "results")


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def told(result):
    """summary.json, as somebody else's program reads it."""
    return json.loads((result.folder / "summary.json").read_text())


def contributions(job):
    return [r for r in job.records() if r["record"] == "contribution"]


# ------------------------------------------------------------------------------------ the tables


def test_rounds_csv_holds_every_number_of_the_records(result, job):
    rows = {(int(r["round"]), r["site"]): r for r in read_csv(result.folder / "rounds.csv")}
    for record in contributions(job):
        row, said = rows[record["round"], record["site"]], record["contribution"]
        assert row["accepted"] == "yes" and row["reason"] == ""
        assert row["role"] == said["role"]
        for name in ("training_slices", "training_cases", "evaluated_cases"):
            assert int(row[name]) == said[name]
        assert (int(row["bytes_down"]), int(row["bytes_up"])) == (
            record["bytes_down"],
            record["bytes_up"],
        )
        for name in ("loss", "update_norm"):
            assert row[name] == ("" if said[name] is None else repr(said[name]))
        for metric in METRICS:
            means = [m["mean"] for m in said["metrics"] if m["metric"] == metric]
            expected = "" if means == [None] else repr(float(np.mean(means)))
            assert row[metric] == expected
        for phase, seconds in said["seconds"].items():
            assert float(row[f"seconds_{phase}"]) == seconds
        for phase, size in said["peak_memory_bytes"].items():
            assert int(row[f"peak_memory_bytes_{phase}"]) == size


def test_a_missed_round_is_a_row_with_its_reason(result):
    rows = [r for r in read_csv(result.folder / "rounds.csv") if r["accepted"] == "no"]
    assert [(r["round"], r["site"]) for r in rows] == [("2", "site-2")]
    assert "trainer-died" in rows[0]["reason"]
    assert rows[0]["dice"] == rows[0]["bytes_up"] == ""


def test_evaluation_csv_holds_every_score_and_marks_the_worst_site(result, job):
    rows = read_csv(result.folder / "evaluation.csv")
    expected = [
        (record["site"], record["model"], m["class_name"], m["metric"], m["mean"], m["std"])
        for record in job.records()
        if record["record"] == "evaluation"
        for m in record["contribution"]["metrics"]
    ]
    got = [
        (
            *(row[key] for key in ("site", "model", "class", "metric")),
            *(float(row[key]) if row[key] else None for key in ("mean", "std")),
        )
        for row in rows
    ]
    assert sorted(got, key=str) == sorted(expected, key=str)
    worst = {(r["model"], r["metric"]): r["site"] for r in rows if r["worst"] == "yes"}
    assert worst == {(m, metric): "site-4" for m in ("final", "best") for metric in METRICS}


def test_the_worst_hd95_is_the_largest(tmp_path):
    job = Job(withheld=(), models=("final",))
    records = job.records()
    for record in records:
        if record["record"] == "evaluation" and record["site"] == "site-1":
            for metric in record["contribution"]["metrics"]:
                if metric["metric"] == "hd95":
                    metric["mean"] = 99.0
    result = collect(job.write(tmp_path / "job", records), tmp_path / "results")
    assert [r.site for r in result.evaluation if r.worst and r.metric == "hd95"] == ["site-1"]


def test_reading_the_folder_back_gives_what_was_written(result):
    assert load_result(result.folder) == result


# ----------------------------------------------------------------------------------- the summary


def test_summary_says_dice_before_and_after_over_the_training_sites_that_let_it_out(result):
    dice = told(result)["dice"]
    sites = ["site-1", "site-2"]
    assert dice["round_0"]["sites"] == dice["final"]["sites"] == sites
    assert dice["round_0"]["mean"] == pytest.approx(np.mean([dice_of(s, 0) for s in sites]))
    assert dice["final"]["mean"] == pytest.approx(np.mean([dice_of(s, 6) for s in sites]))
    assert dice["best"]["mean"] == pytest.approx(np.mean([dice_of(s, 5) for s in sites]))
    assert list(told(result)["unseen"]) == ["site-4"]
    assert told(result)["unseen"]["site-4"]["final"] == pytest.approx(dice_of("site-4", 6))
    assert told(result)["worst_site"]["site"] == "site-4"


def test_summary_adds_up_bytes_and_time(result):
    answered = 6 * 4 - 1
    total = told(result)["bytes"]
    assert total["down"] == answered * BYTES_DOWN
    assert total["up"] == (answered - 6) * BYTES_UP  # the unseen site sends no tensors
    assert total["total"] == total["down"] + total["up"]
    assert told(result)["job"]["seconds"] == pytest.approx(20 + 6 * 41.5 + 9.5)
    assert told(result)["sites"]["site-1"]["seconds"]["train"] == pytest.approx(
        sum(0.071 * 412 + 0.4 * r for r in range(6))
    )


def test_summary_names_the_missed_rounds(result):
    assert list(told(result)["missed"]) == ["site-2"]
    assert [m["round"] for m in told(result)["missed"]["site-2"]] == [2]


def test_summary_table_has_a_row_a_site_for_the_terminal(result):
    rows = summary_table(result.folder)
    assert [row["site"] for row in rows] == ["site-1", "site-2", "site-3", "site-4"]
    first, withheld, unseen = rows[0], rows[2], rows[3]
    assert first["dice_after"] - first["dice_before"] == pytest.approx(first["change"])
    assert first["cases"] == CASES["site-1"]
    assert withheld["dice_after"] is None and withheld["note"] == WITHHELD
    assert unseen["role"] == "holdout" and unseen["lowest"]
    assert rows[1]["missed"] == 1


def test_two_classes_count_as_their_mean(tmp_path):
    recipe = dataclasses.replace(RECIPE, classes=("anterior", "posterior"))
    result = collect(Job(recipe=recipe).write(tmp_path / "job"), tmp_path / "results")
    expected = np.mean([dice_of("site-1", 6, 0), dice_of("site-1", 6, 1)])
    assert told(result)["sites"]["site-1"]["final"] == pytest.approx(expected)


def test_models_and_pictures_are_copied_and_hashed(result):
    for name in ("global_model.safetensors", "best_model.safetensors", "recipe.json"):
        digest = hashlib.sha256((result.folder / name).read_bytes()).hexdigest()
        assert told(result)["files"][name]["sha256"] == digest
    assert len(told(result)["pictures"]) == 12
    for picture in told(result)["pictures"]:
        assert (result.folder / picture["file"]).is_file()


# --------------------------------------------------------------------------- withheld and missing


def test_a_withheld_score_is_told_from_one_that_no_case_has(tmp_path):
    job = Job(withheld=())
    records = job.records()
    for record in records:
        if record["record"] != "evaluation":
            continue
        for metric in record["contribution"]["metrics"]:
            if record["site"] == "site-1" and metric["metric"] == "hd95":
                metric.update(mean=None, std=None, cases=0)  # no case has a distance
            if record["site"] == "site-2":  # the door, where a site has too few cases altogether
                metric.update(mean=None, std=None, cases=0, empty=0)
    result = collect(job.write(tmp_path / "job", records), tmp_path / "results")
    notes = {(r.site, r.metric): r.note for r in result.evaluation if r.model == "final"}
    assert notes["site-1", "hd95"] == "no case has a value"
    assert notes["site-1", "dice"] == ""
    assert notes["site-2", "dice"] == notes["site-2", "hd95"] == WITHHELD


def test_a_site_without_final_evaluation_keeps_its_reason(tmp_path):
    job = Job(no_evaluation={"site-1": "TrainerError (no-trainer); the site's own log has more"})
    result = collect(job.write(tmp_path / "job"), tmp_path / "results")
    row = next(r for r in result.evaluation if r.site == "site-1" and r.model == "final")
    assert row.metric == "" and "no-trainer" in row.note
    assert told(result)["sites"]["site-1"]["after"] is None
    assert told(result)["dice"]["gain"]["sites"] == ["site-2"]


def test_a_refused_contribution_is_no_score_and_no_answer(tmp_path):
    job = Job(missed={}, refused={(0, "site-1"): "non-finite"})
    result = collect(job.write(tmp_path / "job"), tmp_path / "results")
    assert told(result)["sites"]["site-1"]["round_0"] is None
    assert told(result)["missed"]["site-1"] == [{"round": 0, "reason": "non-finite"}]


# -------------------------------------------------------------------------------- interrupted run


@pytest.mark.parametrize("lines", range(1, 46, 4))
def test_records_that_end_anywhere_give_a_result(tmp_path, job, lines):
    folder = job.write(tmp_path / "job")
    path = folder / "records.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    cut = whole[lines][: len(whole[lines]) // 2] if lines < len(whole) else ""
    path.write_text("".join(whole[:lines]) + cut)
    result = collect(folder, tmp_path / "results")
    kept = [json.loads(line) for line in whole[:lines]]
    answers = [r for r in kept if r["record"] == "contribution"]
    assert sum(row.accepted for row in result.rounds) == len(answers)
    assert told(result)["unreadable_records"] == (1 if cut else 0)
    finished = kept[-1]["record"] == "job_done"
    assert told(result)["job"]["status"] == ("completed" if finished else "interrupted")
    summary_table(result)


def test_without_final_evaluation_the_last_scored_round_stands_in_and_says_so(tmp_path):
    job = Job(rounds=3, models=(), status="aborted")
    result = collect(job.write(tmp_path / "job"), tmp_path / "results")
    sites = told(result)["sites"]
    assert sites["site-1"]["after"] == pytest.approx(dice_of("site-1", 2))
    assert sites["site-1"]["after_is"] == "round 2"
    assert sites["site-2"]["after_is"] == "round 1"  # it missed round 2
    assert sites["site-3"]["note"] == WITHHELD
    assert told(result)["dice"]["final"]["mean"] is None


def test_models_of_different_rounds_are_not_compared(tmp_path):
    """Site-2 was scored in round 0 alone, when nothing was learnt yet."""
    gone = {(1, "site-2"): "the site is gone", (2, "site-2"): "the site is gone"}
    job = Job(rounds=3, models=(), status="aborted", missed=gone, withheld=())
    result = collect(job.write(tmp_path / "job"), tmp_path / "results")
    summary = told(result)
    assert summary["sites"]["site-2"]["after_is"] == "round 0"
    (part,) = summary["parts"]
    assert part["after_is"] == "round 2"
    for key in ("after", "gain"):
        assert part["dice"][key]["sites"] == ["site-1", "site-3"]
    expected = np.mean([dice_of(site, 2) for site in ("site-1", "site-3")])
    assert part["dice"]["after"]["mean"] == pytest.approx(expected)
    lowest = min(("site-1", "site-3", "site-4"), key=lambda site: dice_of(site, 2))
    assert part["worst_site"]["site"] == lowest


def test_rounds_without_an_evaluation_are_neither_withheld_nor_missing(tmp_path):
    recipe = dataclasses.replace(RECIPE, evaluate_every=3)
    result = collect(Job(recipe=recipe).write(tmp_path / "job"), tmp_path / "results")
    own = [row for row in result.rounds if row.site == "site-1"]
    assert [row.dice is not None for row in own] == [True, False, False, True, False, False]
    assert [row.evaluated_cases for row in own] == [14, 0, 0, 14, 0, 0]
    assert all(row.accepted and row.loss is not None for row in own)
    site = told(result)["sites"]["site-1"]
    assert (site["round_0"], site["final"]) == (dice_of("site-1", 0), dice_of("site-1", 6))
    assert site["missed"] == [] and site["note"] == ""
    # without the final evaluation: the last round that was scored, and who withholds still does
    job = Job(recipe=recipe, models=(), status="aborted", missed={})
    cut = told(collect(job.write(tmp_path / "cut"), tmp_path / "cut-results"))["sites"]
    assert (cut["site-1"]["after"], cut["site-1"]["after_is"]) == (dice_of("site-1", 3), "round 3")
    assert cut["site-1"]["cases"] == 14
    assert cut["site-3"]["after"] is None and cut["site-3"]["note"] == WITHHELD


def test_a_round_that_never_ended_is_no_missed_round(tmp_path, job):
    records = [r for r in job.records() if r["record"] in ("job", "round_started")][:2]
    result = collect(job.write(tmp_path / "job", records), tmp_path / "results")
    assert told(result)["missed"] == {} and result.rounds == ()


def test_a_site_that_is_silent_in_a_finished_round_missed_it(tmp_path):
    job = Job(missed={})
    records = [
        r for r in job.records() if not (r["record"] == "contribution" and r["site"] == "site-1")
    ]
    result = collect(job.write(tmp_path / "job", records), tmp_path / "results")
    assert len(told(result)["missed"]["site-1"]) == 6


def test_a_strange_value_from_a_site_does_not_break_the_result(tmp_path):
    job = Job(missed={})
    records = job.records()
    first, second, third, *_ = [r for r in records if r["record"] == "contribution"]
    first["contribution"].update(
        loss=math.nan, seconds={"train": "long"}, peak_memory_bytes={"train": "much"}
    )
    second["contribution"]["surprise"] = 1
    third["contribution"] = None
    result = collect(job.write(tmp_path / "job", records), tmp_path / "results")
    assert result.rounds[0].loss is None and result.rounds[0].dice is None
    assert result.rounds[1].dice is None and result.rounds[2].dice is None
    assert told(result)["unreadable_records"] == 2


def test_pictures_outside_the_folder_or_of_another_kind_stay_out(tmp_path, job):
    records = job.records()
    record = next(r for r in records if r["record"] == "evaluation")
    record["pictures"] = []
    folder = job.write(tmp_path / "job", records)
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (folder / "pictures" / "page.png").write_text("<script>")
    (folder / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["pictures/../../secret.png", "pictures/page.png", "pictures/link.png", "pictures/no"]
    record["pictures"] = [*names, str(tmp_path / "secret.png")]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    result = collect(folder, tmp_path / "results")
    assert [
        p for p in told(result)["pictures"] if (p["site"], p["model"]) == ("site-1", "final")
    ] == []


# ------------------------------------------------------------------------------ folders, refusals


def test_an_earlier_result_is_never_overwritten(tmp_path, job):
    folder = job.write(tmp_path / "job")
    collect(folder, tmp_path / "results")
    before = {p: p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()}
    with pytest.raises(FederationError, match="name a new folder") as caught:
        collect(folder, tmp_path / "results")
    assert caught.value.code == "results-exist"
    assert before == {p: p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()}


def test_a_failure_leaves_nothing_behind(tmp_path, job, monkeypatch):
    folder = job.write(tmp_path / "job")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedfms.report.collect.write_rows", full)
    with pytest.raises(FederationError, match="No space") as caught:
        collect(folder, tmp_path / "results")
    assert "a disk that has room" in caught.value.fix
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job"]


def test_an_empty_folder_may_be_filled_and_records_may_lie_below(tmp_path, job):
    job.write(tmp_path / "job" / "workspace" / "app_server")
    (tmp_path / "results").mkdir()
    result = collect(tmp_path / "job", tmp_path / "results")
    assert told(result)["rounds"] == {"planned": 6, "done": 6}


def test_a_folder_without_records_is_refused_with_a_fix(tmp_path):
    (tmp_path / "job").mkdir()
    with pytest.raises(FederationError, match="name the folder of one job's result") as caught:
        collect(tmp_path / "job", tmp_path / "results")
    assert caught.value.code == "no-records"
    (tmp_path / "job" / "records.jsonl").write_text('{"record": "jo')
    with pytest.raises(FederationError, match="look at the server's log"):
        collect(tmp_path / "job", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_damaged_results_folder_is_named(tmp_path, job):
    results = tmp_path / "results"
    collect(job.write(tmp_path / "job"), results)
    for name, text in (
        ("rounds.csv", "round,site\n1"),
        ("summary.json", '{"format": 99}'),
        ("summary.json", '{"for'),
    ):
        (results / name).write_text(text)
        with pytest.raises(FederationError, match="is no results folder") as caught:
            load_result(results)
        assert caught.value.code == "no-results"


# ------------------------------------------------------------------- means of what can be compared

TWO = dataclasses.replace(RECIPE, classes=("anterior", "posterior"))


def unlike(**changes):
    """Site-1 draws one class of two; with that one alone its mean is the highest of all."""
    return Job(
        **({"recipe": TWO, "withheld": (), "not_annotated": {"site-1": ("posterior",)}} | changes)
    )


def test_sites_of_other_classes_are_compared_class_by_class(tmp_path):
    job = unlike()
    result = collect(job.write(tmp_path / "job"), tmp_path / "results")
    anterior, posterior = told(result)["parts"]
    assert (anterior["classes"], posterior["classes"]) == (["anterior"], ["posterior"])
    for part, index, sites in (
        (anterior, 0, ["site-1", "site-2", "site-3"]),
        (posterior, 1, ["site-2", "site-3"]),
    ):
        for key, rounds in (("round_0", 0), ("final", 6), ("best", 5)):
            expected = np.mean([dice_of(site, rounds, index) for site in sites])
            assert part["dice"][key]["mean"] == pytest.approx(expected)
            assert part["dice"][key]["sites"] == sites
        everyone = [*sites, "site-4"]
        lowest = min(everyone, key=lambda site: dice_of(site, 6, index))
        assert part["worst_site"]["site"] == lowest
    assert posterior["sites"]["site-1"]["note"] == NOT_ANNOTATED
    assert told(result)["sites"]["site-1"]["not_annotated"] == ["posterior"]
    assert told(result)["dice"]["final"]["mean"] is None  # no mean over classes exists
    assert told(result)["worst_site"] is None
    rows = {(r["site"], r["class"]): r for r in summary_table(result)}
    assert rows["site-1", "posterior"]["dice_after"] is None
    assert rows["site-1", "anterior"]["dice_after"] == pytest.approx(dice_of("site-1", 6))


def test_a_class_that_a_site_does_not_draw_has_a_row_that_says_so(tmp_path):
    result = collect(unlike().write(tmp_path / "job"), tmp_path / "results")
    rows = [r for r in read_csv(result.folder / "evaluation.csv") if r["site"] == "site-1"]
    said = [(r["model"], r["class"], r["metric"], r["mean"]) for r in rows if r["note"]]
    assert said == [("final", "posterior", "", ""), ("best", "posterior", "", "")]
    assert {r["note"] for r in rows if r["note"]} == {NOT_ANNOTATED}


def test_a_class_without_a_value_in_one_round_is_no_mean_over_fewer_classes(tmp_path):
    """Nothing drawn and nothing found before training, a false alarm later: 0 of one class."""
    job = Job(recipe=TWO, withheld=(), missed={})
    records = job.records()
    for record in records:
        if record["record"] == "contribution" and record["site"] == "site-2":
            for metric in record["contribution"]["metrics"]:
                if metric["class_name"] == "posterior" and record["round"] == 0:
                    metric |= {"mean": None, "std": None, "cases": 0}
    result = collect(job.write(tmp_path / "job", records), tmp_path / "results")
    first, second = told(result)["parts"]
    assert first["dice"]["round_0"]["sites"] == ["site-1", "site-2", "site-3"]
    assert second["dice"]["round_0"]["sites"] == ["site-1", "site-3"]
    assert second["dice"]["gain"]["sites"] == ["site-1", "site-3"]
    assert told(result)["sites"]["site-2"]["not_annotated"] == []


def test_best_and_final_are_compared_over_the_same_sites(tmp_path):
    why = "no answer within 600 s"
    job = Job(withheld=(), missed={}, no_best={"site-3": why})
    result = collect(job.write(tmp_path / "job"), tmp_path / "results")
    dice = told(result)["dice"]
    assert dice["best"]["sites"] == ["site-1", "site-2"]
    assert dice["final"]["sites"] == ["site-1", "site-2", "site-3"]
    both = dice["best_against_final"]
    assert both["sites"] == ["site-1", "site-2"]
    assert both["final"] == pytest.approx((dice_of("site-1", 6) + dice_of("site-2", 6)) / 2)
    assert both["best"] == pytest.approx((dice_of("site-1", 5) + dice_of("site-2", 5)) / 2)
    missed = [{"site": "site-3", "model": "best", "reason": why}]
    assert told(result)["missed_evaluations"] == missed


def test_millimetres_and_pixels_have_no_worst_site_in_common(tmp_path):
    job = Job(withheld=(), models=("final",))
    records = job.records()
    for record in records:
        if record["record"] == "evaluation" and record["site"] == "site-1":
            record["contribution"]["distance_unit"] = "px"
            for metric in record["contribution"]["metrics"]:
                if metric["metric"] == "hd95":
                    metric["mean"] = 99.0
    result = collect(job.write(tmp_path / "job", records), tmp_path / "results")
    expected = max(("site-2", "site-3", "site-4"), key=lambda site: -dice_of(site, 6))
    assert [r.site for r in result.evaluation if r.worst and r.metric == "hd95"] == [expected]
