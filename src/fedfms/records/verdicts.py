"""What the guard of a round found, in words: for notes, reports and pages alike."""

from __future__ import annotations

from fedfms.contracts.verdict import Finding, Verdict
from fedfms.records.schema import Judged


def findings(judged: Judged) -> list[tuple[str, str]]:
    """A sentence for each site of which something was found: (site, text), by site."""
    return [(one.site, sentence(one, acts=judged.acts)) for one in judged.sites if one.findings]


def sentence(verdict: Verdict, *, acts: bool) -> str:
    """What was found of one site, with the figure, and what was done about it."""
    said = [_found(one, verdict) for one in verdict.findings]
    if not acts:
        done = "this is only recorded"
    elif verdict.factor == 0:
        done = "it was left out of the average"
        if verdict.findings == ("weight",):  # of a secure sum: nothing else can be done about it
            done += f", unless the recipe's confirmed_weights names {verdict.site}"
    else:
        parts = []
        if verdict.factor != 1:
            parts.append(f"it was scaled by {verdict.factor:.3g}")
        if verdict.counts_for != _says(verdict):
            parts.append(
                f"it counts for {verdict.counts_for}, unless the recipe's "
                f"confirmed_weights names {verdict.site}"
            )
        done = "; ".join(parts)
    return f"{verdict.site}'s answer {' and '.join(said)}; {done}"


def _says(verdict: Verdict) -> int:
    return verdict.slices if verdict.weight is None else verdict.weight


def _found(finding: Finding, verdict: Verdict) -> str:
    if finding == "norm":
        return f"is {verdict.times:.3g} times as long as the others let expect"
    if finding == "direction":
        return f"points against the others (cosine {verdict.cosine:.2f})"
    if finding == "weight":
        what = "slices" if verdict.weight is None else "cases"
        return f"is of {_says(verdict)} {what}, far more than the others have"
    return "repeats one of an earlier round"
