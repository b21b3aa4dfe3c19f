"""The three answers above all tables: did federating pay, for whom, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedfms.report import words as shown
from fedfms_lab.study.analysis.statistics import CONFIDENCE, FEWEST_SEEDS_OF_A_TEST
from fedfms_lab.study.answer import ALL, FAILS_BELOW, ROLES, Against, Answer, Gap, LocalCell, Role
from fedfms_lab.study.page import words

_POOLED: tuple[Against, ...] = ("central-matched", "central")
Answers = list[tuple[str, str]]  # question, and sentences that answer it


def answers(found: Answer) -> dict[str, Answers]:
    """By method what the tables come to."""
    told = {words.method(name): list(_of_method(found, name)) for name in found.study.methods}
    return {title: pairs for title, pairs in told.items() if pairs}


def _of_method(found: Answer, name: str) -> Iterator[tuple[str, str]]:
    primary = {role: found.primary(name, role) for role in ROLES}
    did = [_did(found, gap) for gap in primary.values() if gap is not None]
    if did:
        yield "Did federating pay?", " ".join(did)
    if who := [*_for_whom(found, name), *_alone_elsewhere(found, name)]:
        yield "For whom?", " ".join(who)
    if pooled := _against_pooled(found, name):
        yield "And against pooled images?", pooled
    if cost := _cost(found, name):
        yield "At what cost?", cost


def _did(found: Answer, gap: Gap) -> str:
    if gap.p_holm is None:
        word = "cannot be said"
    elif gap.p_holm >= 1 - CONFIDENCE:
        word = "not shown"
    else:
        word = "yes" if gap.difference > 0 else "no, it cost"
    where = words.ROLES[gap.role]
    return (
        f"At {where} {word}: {_difference(found, gap)} against {_without(gap)} ({_evidence(gap)})."
    )


def _without(gap: Gap) -> str:
    if gap.against == "ensemble":
        return "the ensemble of sites alone"
    if gap.against == "local":
        return "each site's own model" if gap.role == "train" else "the models of other sites"
    return words.against(gap)


def _against_pooled(found: Answer, name: str) -> str:
    told = []
    for role in ROLES:
        parts = [
            f"{_difference(found, gap)} ({words.interval(gap.interval)}) against "
            f"{words.against(gap)}"
            for gap in found.gaps
            if (gap.method, gap.role, gap.site) == (name, role, ALL)
            and gap.against in _POOLED
            and not gap.primary
        ]
        if parts:
            told.append(f"At {words.ROLES[role]} {', '.join(parts)}.")
    return " ".join(told)


def _for_whom(found: Answer, name: str) -> Iterator[str]:
    """Site by site, in the primary comparison at training sites."""
    sites = [
        gap
        for gap in found.gaps
        if gap.site != ALL and gap.primary and (gap.method, gap.role) == (name, "train")
    ]
    if len(sites) > 1:
        ahead = sorted((g for g in sites if g.difference > 0), key=lambda g: -g.difference)
        behind = sorted((g for g in sites if g.difference <= 0), key=lambda g: g.difference)
        parts = [
            f"{len(group) or 'none'} of {shown.numerals(len(sites), 'training site')} "
            f"{'is' if len(group) < 2 else 'are'} {how}{_listed(group)}"
            for group, how in ((ahead, "ahead"), (behind, "not ahead"))
        ]
        told = "; ".join(parts if ahead and behind else parts[:1] if ahead else parts[1:])
        yield f"Against {_without(sites[0])} {told}."
    for role in ROLES:
        line, alone = found.line(name, "federated", role), found.line(name, *_other(found, role))
        if line and alone and line.worst and alone.worst:
            yield (
                f"Worst of the {words.ROLES[role]}: {shown.score(line.sites[line.worst].value)} "
                f"({line.worst}), with {words.REGIMES[alone.regime]} "
                f"{shown.score(alone.sites[alone.worst].value)} ({alone.worst})."
            )


def _other(found: Answer, role: Role) -> tuple[str, Role]:
    """What sites have without federating, in this study."""
    has_ensemble = role == "unseen" and "ensemble" in found.study.regimes
    return ("ensemble" if has_ensemble else "local"), role


def _listed(gaps: Sequence[Gap]) -> str:
    named = [f"{gap.site} {shown.change(gap.difference)}{words.star(gap)}" for gap in gaps]
    return f" ({', '.join(named)})" if named else ""


def _alone_elsewhere(found: Answer, name: str) -> Iterator[str]:
    """Where the model of one site fails at another."""
    away = found.away(name)
    if not away:
        return
    fails = [cell for cell in away if cell.fails]
    behind = [cell for cell in away if _behind(cell) > 0]
    told = (
        "Trained at one site alone and scored at another, a model fails (more than "
        f"{FAILS_BELOW:.2f} Dice{words.of_common(found)} below federated training on the same "
        f"cases) in {len(fails) or 'none'} of {shown.numerals(len(away), 'pair')} of sites"
    )
    if fails:
        at = [site for site in found.study.sites if any(cell.scored_at == site for cell in fails)]
        told += f", at {shown.listing(at)}"
    elif behind:
        told += f" and is behind in {len(behind)}"
    if behind:
        worst = max(behind, key=_behind)
        told += (
            f"; worst: trained at {worst.trained_at} and scored at {worst.scored_at}, "
            f"{shown.score(worst.dice.value)}, which is {shown.score(_behind(worst))} below"
        )
    yield f"{told}."


def _behind(cell: LocalCell) -> float:
    return cell.behind or 0.0


def _difference(found: Answer, gap: Gap) -> str:
    return f"{shown.change(gap.difference)} Dice{words.of_common(found)}"


def _evidence(gap: Gap) -> str:
    drawn = f"{shown.numerals(gap.patients, 'patient')}, {shown.numerals(gap.seeds, 'seed')}"
    if gap.interval is None:
        return f"no interval; {drawn}"
    told = f"95 % interval {words.interval(gap.interval)}"
    if gap.p_holm is not None:
        told += f", p {words.p_value(gap.p_holm)} after Holm"
    elif gap.seeds < FEWEST_SEEDS_OF_A_TEST:
        told += ", no test"
    return f"{told}; {drawn}"


def _cost(found: Answer, name: str) -> str:
    parts = []
    for moved in found.communication:
        if moved.method == name and moved.down and moved.up and moved.rounds:
            parts.append(
                f"A site receives {shown.size(moved.down.mean)} and sends "
                f"{shown.size(moved.up.mean)} in each of {moved.rounds.mean:.0f} rounds; all sites "
                f"move {shown.size(moved.both_ways)} in a run"
            )
            if found.line(name, "ensemble", "train"):
                parts[-1] += ", where an ensemble moves each model once"
    times = {
        cost.regime: cost.seconds["train"].mean
        for cost in found.training
        if cost.method == name and "train" in cost.seconds
    }
    if "federated" in times:
        told = f"Training takes {shown.duration(times['federated'])} of all sites together"
        others = [
            f"{words.REGIMES[regime]} {shown.duration(times[regime])}"
            for regime in ("local", "central")
            if regime in times
        ]
        parts.append(f"{told}{' (' + ', '.join(others) + ')' if others else ''}")
    return f"{'. '.join(parts)}." if parts else ""
