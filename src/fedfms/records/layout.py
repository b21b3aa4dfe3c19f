"""The names of the files of a results folder, each said once.

The server's result folder holds records, recipe, models and pictures while a job runs; a results
folder holds these, the tables, the summary and the report; a run of a study holds some of them.
"""

from __future__ import annotations

from pathlib import Path

RECORDS = "records.jsonl"  # what happened, while it happens (records.schema)
RECIPE = "recipe.json"  # as it ran; also in a job's app/config and beside a model
GLOBAL_MODEL = "global_model.safetensors"  # travelling tensors after the last round, fp32
BEST_MODEL = "best_model.safetensors"  # the same of the best round by validation
PICTURES = "pictures"  # folder of overlays, of sites whose policy lets them out
ROUNDS = "rounds.csv"  # records.rows.RoundRow
EVALUATION = "evaluation.csv"  # records.rows.EvaluationRow
GUARD = "guard.csv"  # records.rows.GuardRow
SUMMARY = "summary.json"  # report.summary.Summary
REPORT_HTML, REPORT_MD = "report.html", "report.md"

# What a server keeps beside its results where it is told to: a folder for each run.
ANSWERS = "answers"  # of the server's workspace; of a results folder: a copy of a run's
START_MODEL = "start_model.safetensors"  # in it: what the first round began with, fp32

MODEL = "model.safetensors"  # of a run of a study; in a job's app/config: what it starts from


def answers_folder(workspace: Path, job_id: str) -> Path:
    """Where a server keeps the answers of a run, if it does."""
    return workspace / ANSWERS / job_id


def kept_answer(number: int, site: str) -> str:
    """Where a site's answer to a round lies in the folder of a run's answers.

    Args:
        number: of the round, from 0.
    """
    return f"round-{number:04d}/{site}.safetensors"
