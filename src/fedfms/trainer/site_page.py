"""The ledger as a page that needs nothing else: for a site's own people, in its work volume."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedfms.contracts.policy import Policy
from fedfms.pages import numbers
from fedfms.pages.parts import environment
from fedfms.trainer.ledger import PAGE, Entry

RUNS = 4  # in full; of older ones a line each
ROUNDS = 200  # of a run

_WHAT = {"left": "left", "refused": "refused", "failed": "nothing left", "stopped": "stopped"}


@dataclass(frozen=True, slots=True)
class Line:
    """One task, as it is shown."""

    when: str
    asked: str
    event: str  # asked, left, refused, failed, stopped
    what: str
    tensors: str = ""
    scores: str = ""
    pictures: str = ""
    took: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """All tasks of one job, the newest first."""

    id: str
    name: str
    submitter: str
    method: str
    recipe: str
    began: str
    lines: Sequence[Line]
    total: str  # bytes that left
    answers: int  # that left

    @property
    def scores(self) -> str:
        """Of the last answer with any."""
        return next((line.scores for line in self.lines if line.scores), "")


def render(entries: Sequence[Entry], site: str, policy: Policy | None) -> str:
    """The page.

    Args:
        entries: the oldest first.
        site: its name in the federation.
        policy: whose rules stand above, as the last task read them; None before one did.
    """
    now = time.time()
    runs = runs_of(entries)
    asked = entries[-1] if entries and entries[-1].event == "asked" else None
    return str(
        _template().render(
            site=site,
            made=numbers.moment(now),
            asked=asked,
            asked_what=_asked(asked) if asked else "",
            asked_since=numbers.moment(asked.time) if asked else "",
            rules=_rules(policy) if policy is not None else [],
            runs=runs[:RUNS],
            older=runs[RUNS:],
            page=PAGE,
            last=_last_scores(entries),
        )
    )


def runs_of(entries: Sequence[Entry]) -> list[Run]:
    """Jobs, the newest first."""
    by_job: dict[str, list[Entry]] = {}
    for entry in entries:
        by_job.setdefault(entry.job, []).append(entry)
    return [_run(found) for found in sorted(by_job.values(), key=lambda one: -one[-1].time)]


def _run(found: Sequence[Entry]) -> Run:
    last = found[-1]
    ended = [one for one in found if one.event != "asked"]
    lines = [_line(one, found) for one in reversed(ended)]
    left = [one for one in ended if one.event == "left"]
    return Run(
        id=last.job,
        name=last.job_name or last.method,
        submitter=last.submitter or "",
        method=last.method,
        recipe=last.recipe_sha256[:12],
        began=numbers.moment(found[0].time),
        lines=lines[:ROUNDS],
        total=numbers.size(sum(one.bytes for one in left)),
        answers=len(left),
    )


def _line(one: Entry, found: Sequence[Entry]) -> Line:
    again = one.event == "left" and any(
        other.event == "left" and _asked(other) == _asked(one) and other.time < one.time
        for other in found
    )
    tensors = scores = pictures = ""
    if one.event == "left":
        tensors = "none"
        if one.tensors:
            tensors = (
                f"{numbers.numerals(one.tensors, 'tensor')}, {numbers.count(one.values)} numbers "
                f"({one.precision}), {numbers.size(one.bytes)}"
            ) + (", all of them 0" if one.canary else "")
        scores = _scores(one)
        pictures = numbers.numerals(one.pictures, "picture") if one.pictures else ""
    return Line(
        when=numbers.moment(one.time),
        asked=_asked(one),
        event=one.event,
        what=_WHAT.get(one.event, one.event) + (", the same again" if again else ""),
        tensors=tensors,
        scores=scores,
        pictures=pictures,
        took=numbers.duration(one.seconds) if one.seconds is not None else "",
        why=f"{one.why} ({one.code})" if one.code and one.why != one.code else one.code,
    )


def _asked(one: Entry) -> str:
    """What the server asked for, in words."""
    if one.canary:
        return f"a canary: {_asked(dataclasses.replace(one, canary=False))}"
    if one.kind == "evaluate":
        return f"score the {one.model} model"
    if one.holdout:
        return f"score the model of round {one.round + 1} of {one.rounds}"
    return f"train round {one.round + 1} of {one.rounds}"


def _scores(one: Entry) -> str:
    parts = []
    if one.told:
        parts.append(f"{numbers.numerals(len(one.told), 'mean')}")
    if one.withheld:
        parts.append(f"{one.withheld} withheld or without a value")
    if one.loss is not None:
        parts.append("the training loss")
    return ", ".join(parts) or "none"


def _last_scores(entries: Sequence[Entry]) -> list[tuple[str, str, str, str]]:
    """(class, score, mean, cases) of the last answer with any, exactly as they left."""
    for one in reversed(entries):
        if one.event == "left" and one.told:
            return [
                (
                    metric.class_name.replace("_", " "),
                    metric.metric,
                    f"{metric.mean:.4f}",
                    numbers.count(metric.cases),
                )
                for metric in one.told
            ]
    return []


def _rules(policy: Policy) -> list[str]:
    """The site's policy in sentences."""
    rules = [
        f"Methods that may run here: {numbers.listing(policy.methods)}; at most "
        f"{numbers.numerals(policy.max_rounds, 'round')}.",
        f"A score over fewer than {policy.min_cases} cases stays here (more, if site.yml says so)."
        if policy.min_cases > 1
        else "Scores leave from the first case on, unless site.yml asks for more.",
        "Pictures of validation cases may leave." if policy.pictures else "No picture leaves.",
        f"A round has at least {numbers.numerals(policy.min_steps, 'step')} on "
        f"{numbers.numerals(policy.min_batch_size, 'slice')} each, of at least "
        f"{numbers.numerals(policy.min_training_patients, 'patient')}.",
        f"In all at most {numbers.numerals(policy.max_total_rounds, 'round')} and "
        f"{numbers.numerals(policy.max_total_evaluations, 'evaluation')}, whichever job asks.",
    ]
    if policy.clip_norm is not None:
        rules.append(f"A change of the model is scaled to a norm of {policy.clip_norm:g} at most.")
    if policy.noise_std:
        rules.append(f"Noise is added to each of its numbers: {policy.noise_std:g} of that norm.")
    return rules


@functools.cache
def _template() -> Any:
    return environment("fedfms.trainer", "fedfms.pages").get_template("site-page.html.j2")
