"""A study's finished runs to study.html, study.md, study.csv and study.tex.

study.html is one page that needs nothing else; its links lead to the runs' folders beside it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fedfms.files import write_together
from fedfms.pages.parts import environment, picture_key
from fedfms.records.rows import rows_text
from fedfms_lab.study.analysis.build import answer as answer_of
from fedfms_lab.study.answer import Answer, read_study
from fedfms_lab.study.numbers import Number, numbers
from fedfms_lab.study.page import words
from fedfms_lab.study.page.answers import answers
from fedfms_lab.study.page.latex import document
from fedfms_lab.study.page.summary import headlines, meta, notices
from fedfms_lab.study.page.tables_costs import cost_tables
from fedfms_lab.study.page.tables_gaps import forests, gap_tables, why_no_gaps
from fedfms_lab.study.page.tables_runs import data_table, overlays, rate_table, run_table, what_ran
from fedfms_lab.study.page.tables_scores import (
    class_tables,
    curves,
    false_alarm_tables,
    local_tables,
    score_tables,
    slice_tables,
)
from fedfms_lab.study.record import read_runs

log = logging.getLogger(__name__)

STUDY_HTML, STUDY_MD, STUDY_CSV, STUDY_TEX = "study.html", "study.md", "study.csv", "study.tex"

LIMITS = [
    "Research software. Not a medical device, and not for decisions about a patient.",
    "A study runs where the images of all its sites can be read. It tells what federated training "
    "would come to at these sites; it is no test of the network or of the people between them.",
    "Sites differ in scanners, patients and annotators, so a difference between two sites is not a "
    "difference of the model alone. Compare the rows of one column.",
    "Intervals are of other patients and other seeds at these sites. How a model would do at a "
    "further hospital, each unseen site tells once.",
]
_UNTUNED = (
    "All runs take their recipe as it is: nothing was tuned for one way to train, which is no "
    "proof that each had its best."
)
_TUNED = (
    "Each way to train chose its learning rate among the same ones, on validation cases that its "
    "scores at training sites are of, too; those are the better for it, at every way alike."
)

_MEASURE = (
    "A site's score is the mean over its cases, then over the classes (of one class where a table "
    "names it); 3-D for volumes, at the images' own resolution; Dice and IoU in [0, 1]."
)


def write_answer(study_folder: Path) -> None:
    """Write study.html, study.md, study.csv and study.tex from the runs that have finished.

    Earlier ones are replaced. All four are there in full before the first is put in its place.

    Raises:
        FederationError: the folder is no study (`no-study`), or a run in it is damaged (`no-run`).
    """
    found = answer_of(read_study(study_folder), read_runs(study_folder))
    page = _page(found)
    templates = environment("fedfms_lab.study", "fedfms.pages")
    texts = {
        name: templates.get_template(f"{name}.j2").render(page=page)
        for name in (STUDY_HTML, STUDY_MD)
    }
    texts[STUDY_CSV] = rows_text(Number, numbers(found))
    groups = {
        "dice": "scores",
        "difference": "gaps",
        "local": "local",
        "class": "classes",
        "alarm": "alarms",
        "further": "further",
        "slice": "slices",
        "cost": "costs",
    }
    for_paper = [
        (f"{label}-{place}", table)
        for label, name in groups.items()
        for place, table in enumerate(page[name], start=1)
    ]
    texts[STUDY_TEX] = document(page["title"], for_paper)
    write_together({study_folder / name: text for name, text in texts.items()})
    log.info(
        "answer of %d of %d runs written", len(found.runs), len(found.runs) + len(found.missing)
    )


def _page(found: Answer) -> dict[str, Any]:
    """Everything that the two templates show, already in words."""
    study = found.study
    classes = found.runs[0].recipe.get("classes") or () if found.runs else ()
    return {
        "title": study.title or study.name,
        "subtitle": words.question(study),
        "meta": meta(found),
        "notices": list(notices(found)),
        "answers": answers(found),
        "tiles": headlines(found),
        "measure": _MEASURE,
        "scores": score_tables(found, "dice"),
        "gaps": gap_tables(found),
        "forests": forests(found),
        "no_gaps": "" if found.gaps else why_no_gaps(found),
        "curves": curves(found),
        "local": local_tables(found),
        "classes": class_tables(found),
        "alarms": false_alarm_tables(found),
        "further": [*score_tables(found, "iou"), *score_tables(found, "hd95")],
        "slices": slice_tables(found),
        "costs": cost_tables(found),
        "pictures": overlays(found),  # by "FedMSA, site-4, unseen"
        "picture_key": picture_key(classes),
        "facts": what_ran(found),
        "rates": rate_table(found),
        "data": data_table(found),
        "runs": run_table(found),
        "files": [STUDY_CSV, STUDY_TEX, STUDY_MD],
        "limits": [*LIMITS, _TUNED if found.choices else _UNTUNED],
    }
