"""`fedfms egress`: what left a site, when, and for whom, in the trainer's container."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedfms.cli.common import AsJson, WholeWords, out, styled
from fedfms.cli.site import WORK

if TYPE_CHECKING:
    from fedfms.contracts.receipt import Receipt
    from fedfms.trainer.egress import Egress

commands = typer.Typer()


@commands.command()
def egress(
    first: Annotated[
        datetime.datetime | None,
        typer.Option("--from", formats=["%Y-%m-%d"], metavar="DATE", help="First day, 2026-01-31."),
    ] = None,
    last: Annotated[
        datetime.datetime | None,
        typer.Option("--to", formats=["%Y-%m-%d"], metavar="DATE", help="Last day, with it."),
    ] = None,
    work: Annotated[Path, typer.Option(help="The trainer's private folder.")] = WORK,
    as_json: AsJson = False,
) -> None:
    """Say what left this site, when, and for whom: a row for each answer, the oldest first.

    In the trainer's container: docker compose exec SITE-trainer fedfms egress. Days are those of
    the container's clock. The log goes back at least 400 days. Exit code 1 where its chain is
    broken.
    """
    from fedfms.errors import ConfigError
    from fedfms.trainer.egress import LOG, read_egress

    if first is not None and last is not None and last < first:
        raise typer.BadParameter(f"{last:%Y-%m-%d} is before {first:%Y-%m-%d}", param_hint="--to")
    try:
        found = read_egress(work)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {work / LOG}: nothing has left, or that is not the trainer's folder",
            "wait for a job, or name the trainer's folder with --work",
            code="no-egress",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{work / LOG} cannot be read ({error.strerror}): nobody can say what has left",
            "run this in the trainer's container, as its user; or look at that disk",
            code="no-egress",
        ) from None
    receipts = [one.receipt for one in found.receipts]
    shown = [one for one in receipts if _is_within(one, first, last)]
    if as_json:
        answer = {
            "receipts": [{**dataclasses.asdict(one), "sha256": one.sha256} for one in shown],
            "kept_from": found.kept_from,
            "keys": found.keys,
            "problems": found.problems,
            "notes": found.notes,
        }
        out.print_json(json.dumps(answer))
    else:
        _show(shown, first, last)
        _show_chain(found, work / LOG)
    if found.problems:
        raise typer.Exit(1)


def _is_within(
    receipt: Receipt, first: datetime.datetime | None, last: datetime.datetime | None
) -> bool:
    day = datetime.datetime.fromtimestamp(receipt.time).date()
    return (first is None or first.date() <= day) and (last is None or day <= last.date())


def _show(
    receipts: list[Receipt], first: datetime.datetime | None, last: datetime.datetime | None
) -> None:
    if not receipts:
        out.print(f"nothing left{_span(first, last)}")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("when", "what", "for", "numbers", "bytes", "norm", "SHA-256"):
        right = name in ("numbers", "bytes", "norm")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for one in receipts:
        table.add_row(
            f"{datetime.datetime.fromtimestamp(one.time):%Y-%m-%d %H:%M:%S}",
            _what(one),
            f"{one.submitter or 'nobody named'}, {one.job_name or 'a job'} {one.job[:8]}",
            f"{one.values:,}" if one.values else "",
            f"{one.payload_bytes:,}" if one.payload_bytes else "",
            f"{one.norm:.4g}" if one.norm is not None and one.values else "",
            (one.tensors_sha256 or one.report_sha256)[:16],
        )
    out.print(WholeWords(table))
    values, size = sum(one.values for one in receipts), sum(one.payload_bytes for one in receipts)
    pictures = sum(len(one.pictures) for one in receipts)
    jobs = len({one.job for one in receipts})
    out.print(
        f"{_number(len(receipts), 'answer')}{_span(first, last)}, for {_number(jobs, 'job')}: "
        f"{values:,} numbers, {size:,} bytes of tensors, {_number(pictures, 'picture')}"
    )


def _what(receipt: Receipt) -> str:
    """What an answer was, in a few words."""
    if receipt.kind == "train":
        what = f"round {receipt.round + 1} of {receipt.rounds}"
        what = f"{what}, scores only" if receipt.tensors_sha256 is None else what
    else:
        what = f"scores of the {receipt.model} model"
    if receipt.pictures:
        what += f", {_number(len(receipt.pictures), 'picture')}"
    if receipt.canary:
        what += ", a canary: zeros"
    return f"{what}, the same again" if receipt.same_as else what


def _show_chain(found: Egress, path: Path) -> None:
    if found.problems:
        out.print(styled(("FAIL", "bold red"), f" the chain of {path} is broken:"))
        for problem in found.problems:
            out.print(f"     {problem}")
        return
    begins = "from the beginning"
    if found.kept_from is not None:
        begins = f"from {found.kept_from} (UTC); what left before was removed after 400 days"
    out.print(
        styled(
            ("PASS", "bold green"),
            f" the chain is whole {begins}: {_number(len(found.receipts), 'receipt')}",
        )
    )
    for note in found.notes:
        out.print(f"     {note}")
    for key in found.keys[:-1]:
        out.print(f"     an earlier key of this trainer signed the first of them: {key}")


def _span(first: datetime.datetime | None, last: datetime.datetime | None) -> str:
    start = f" from {first:%Y-%m-%d}" if first else ""
    end = f" to {last:%Y-%m-%d}" if last else ""
    return start + end


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
