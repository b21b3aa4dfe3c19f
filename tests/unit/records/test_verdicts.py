"""What the guard of a round found, in words, in guard.csv, and in a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.verdict import Verdict
from fedfms.records.history import History
from fedfms.records.rows import GuardRow, read_rows, write_rows
from fedfms.records.schema import RECORDS, ContributionRecord, Judged, Resumed, RoundDone
from fedfms.records.verdicts import findings

USUAL = Verdict(
    site="site-2",
    norm=1.1,
    usual_norm=1.0,
    cosine=0.42,
    slices=20,
    counted_slices=20,
    factor=1.0,
)
BAD = Verdict(
    site="site-1",
    norm=98.0,
    usual_norm=1.0,
    cosine=-0.61,
    slices=10**9,
    counted_slices=20,
    factor=0.001,
    findings=("norm", "direction", "weight"),
)


def judged(number: int, *sites: Verdict, acts: bool = True) -> Judged:
    return Judged(round=number, acts=acts, sites=sites)


def test_a_finding_is_told_with_its_figure_and_what_was_done() -> None:
    assert findings(judged(0, BAD, USUAL)) == [
        (
            "site-1",
            "site-1's answer is 98 times as long as the others let expect and points against the "
            "others (cosine -0.61) and is of 1000000000 slices, far more than the others have; it "
            "was scaled by 0.001; it counts for 20, unless the recipe's confirmed_weights names "
            "site-1",
        )
    ]
    ((_, only),) = findings(judged(0, BAD, USUAL, acts=False))
    assert only.endswith("; this is only recorded")


def test_what_is_too_long_alone_is_told_with_its_cosine() -> None:
    """From 1.8 times on if it points against the others, so that the reader needs both figures."""
    values = {"site": "site-2", "norm": 1.8, "usual_norm": 1.0, "slices": 9, "counted_slices": 9}
    long = Verdict(**values, cosine=-0.52, factor=0.278, findings=("norm",))
    ((_, said),) = findings(judged(3, long, USUAL))
    assert said == (
        "site-2's answer is 1.8 times as long as the others let expect (cosine -0.52 to their "
        "mean); it was scaled by 0.278"
    )


def test_a_repetition_is_told_as_left_out() -> None:
    values = {"site": "site-3", "norm": 1.0, "usual_norm": 0.0, "cosine": None, "slices": 9}
    again = Verdict(**values, counted_slices=0, factor=0.0, findings=("replay",))
    assert findings(judged(2, again)) == [
        (
            "site-3",
            "site-3's answer repeats one of an earlier round; it was left out of the average",
        )
    ]


def test_a_record_comes_back_from_its_line() -> None:
    record = judged(3, BAD, USUAL)
    assert RECORDS.validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize("change", [{"factor": -0.1}, {"norm": float("nan")}, {"findings": ["x"]}])
def test_a_record_that_no_guard_writes_is_none(change: dict) -> None:
    values = judged(3, USUAL).model_dump(mode="json")
    values["sites"][0] |= change
    with pytest.raises(ValueError, match="validation error"):
        RECORDS.validate_python(values)


def test_the_table_has_every_answer_and_rounds_done_again_count_once(tmp_path: Path) -> None:
    records = [
        judged(0, BAD, USUAL),
        RoundDone(round=0, sites=("site-1", "site-2")),
        judged(1, USUAL),
        Resumed(round=1),
        ContributionRecord(round=1, site="site-2", accepted=True),
        judged(1, BAD, USUAL),
        RoundDone(round=1, sites=("site-2",)),
    ]
    recipe = Recipe(
        method="fedmsa",
        backbone="vit_demo",
        backbone_sha256="a" * 64,
        classes=("disc",),
        rounds=2,
    )
    history = History(records, recipe.to_dict())
    rows = history.guard_rows()
    assert [(one.round, one.site) for one in rows] == [
        (0, "site-1"),
        (0, "site-2"),
        (1, "site-1"),
        (1, "site-2"),
    ]
    assert rows[0].findings == "norm;direction;weight" and rows[0].text.startswith(
        "site-1's answer"
    )
    write_rows(tmp_path / "guard.csv", GuardRow, rows)
    assert read_rows(tmp_path / "guard.csv", GuardRow) == tuple(rows)
