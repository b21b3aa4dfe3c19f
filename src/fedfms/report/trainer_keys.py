"""Whose receipts a run holds: the key of each site's trainer, beside what the sites say themselves.

A receipt is signed twice. The certificate's key came from the coordinator's authority, who can
issue another certificate with any name; the trainer's key is the site's own. So that a site is
known by its receipts rests on its trainer's key being the one that the site's people read out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedfms.contracts.decode import Misfits
from fedfms.contracts.receipt import Countersigned
from fedfms.records.schema import ContributionRecord, EvaluationRecord, Record

NOT_COMPARED = (
    "compared with nothing that a site said: whoever runs the server can have made them. Let each "
    'site read out "the key of this trainer" in its trainer\'s log, write {"site-1": "64 digits", '
    "…} into a file, and name it with --peers"
)


@dataclass(frozen=True, slots=True)
class Keys:
    """What came of it."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    note: str = ""  # a line for each key, and what they were compared with
    looked: bool = True


def check_keys(records: Sequence[Record], peers: Mapping[str, str] | None) -> Keys:
    """Which key signed each site's receipts, where it changed, and whether it is the site's.

    Args:
        records: of the run, in their order.
        peers: the key of each site's trainer, as the site said it; None: nobody asked.
    """
    by_site: dict[str, list[tuple[str, str]]] = {}  # where a key begins, and which
    for site, where, key in _signed(records):
        found = by_site.setdefault(site, [])
        if not found or found[-1][1] != key:
            found.append((where, key))
    by_site = dict(sorted(by_site.items()))
    lines = [
        f"{site}: {key}" + (f", from {where} on" if len(found) > 1 else "")
        for site, found in by_site.items()
        for where, key in found
    ]
    problems, warnings = [], []
    for site, found in by_site.items():
        had: set[str] = set()
        for where, key in found:
            if key in had:  # a trainer that lost its key has not got it back
                problems.append(f"{site}, {where}: a key that it had given up signs again: {key}")
            elif had:
                warnings.append(
                    f"{site}, {where}: another key of its trainer signs from here on; a new volume "
                    "at that site, or somebody in between: ask the site"
                )
            had.add(key)
            if peers is not None and peers.get(site, key) != key:
                problems.append(
                    f"{site}, {where}: its receipts are signed by {key}, and by --peers its key is "
                    f"{peers[site]}; the site has made another key, or did not send that"
                )
    if peers is None:
        return Keys(tuple(problems), tuple(warnings), "\n".join([*lines, NOT_COMPARED]), False)
    warnings += [
        f"{site} is not in the file of --peers: its key was compared with nothing"
        for site in by_site
        if site not in peers
    ]
    return Keys(tuple(problems), tuple(warnings), "\n".join(lines))


def _signed(records: Sequence[Record]) -> Iterator[tuple[str, str, str]]:
    """Site, round or evaluation, and key of each receipt of an answer that was taken."""
    for one in records:
        if not isinstance(one, ContributionRecord | EvaluationRecord) or one.receipt is None:
            continue
        if isinstance(one, ContributionRecord):
            if not one.accepted:
                continue
            where = f"round {one.round}"
        else:
            where = f"the evaluation of the {one.model} model"
        try:
            yield one.site, where, Countersigned.from_dict(one.receipt).signed.key
        except Misfits:  # the check of the receipts names it
            continue
