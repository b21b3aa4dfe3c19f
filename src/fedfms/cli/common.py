"""What the commands share: how they print, their common options, progress, the last table."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedfms.errors import FedfmsError
from fedfms.shipped import find_shipped

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from fedfms.flare.progress import Event, FinishedRound

FIRST_LINE_SECONDS = 10.0  # where there is no bar: a short computation says nothing
LINE_SECONDS = 30.0  # between two lines of a long one

# Text is printed as it is. Rich would otherwise read `:CD:` in a fingerprint as an emoji and
# `[red]` in a name as a colour, and end lines at the terminal's edge. What has a colour is styled.
out = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
styled = Text.assemble  # of texts, and of (text, style) for those in colour

Job = Annotated[
    Path,
    typer.Argument(
        metavar="JOB",
        parser=find_shipped,
        help="fedmsa, fedsam, lora, evaluate, or a job folder of your own.",
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="NAME=VALUE", help="Set a value of the recipe; may be repeated."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        parser=find_shipped,
        help="A recipe in the place of the job's own, such as jobs/recipes/fedmsa-paper.json; "
        "--set applies on top.",
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        help="Folder with SAM checkpoints; not for vit_demo. Or set FEDFMS_CHECKPOINTS.",
    ),
]
Data = Annotated[Path | None, typer.Option(help="The folder with the images. Or set SITE_DATA.")]
Classes = Annotated[
    str | None, typer.Option(help="Classes of the job that is to run, such as disc,cup.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def print_error(problem: str, fix: str, about: str = "error") -> None:
    """An error of a command: what is wrong, and what to do, on standard error."""
    err.print(styled((f"{about}:", "bold red"), " ", problem))
    err.print(styled("  ", ("fix:", "bold"), " ", fix))


class WholeWords:
    """A table that cuts no name, path or number: wider than the terminal where it must be.

    Where nobody looks at it, in a file or another program, each row is one line.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=_NO_LIMIT)
        wanted = Measurement.get(console, wide, self._table)
        width = max(wanted.minimum, options.max_width) if console.is_terminal else wanted.maximum
        yield from console.render(self._table, options.update(width=width))


_NO_LIMIT = 100_000  # columns of text


def names_in(text: str | None) -> list[str] | None:
    """The names in a text such as disc,cup; None where an option was not given."""
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def show_error(error: FedfmsError, about: str = "error") -> None:
    """Problem and fix, on standard error."""
    print_error(error.problem, error.fix, about)


def show_details(errors: Iterable[FedfmsError]) -> None:
    """Say where the tracebacks of unexpected errors are; only this user may read them."""
    details = [f"{error.problem}\n{error.details}" for error in errors if error.details]
    if not details:
        return
    try:
        handle, name = tempfile.mkstemp(prefix="fedfms-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(details))
    except OSError:  # nowhere to write: then here
        err.print("\n".join(details))
        return
    err.print(f"  details, which may name files: {name}")


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Any]:
    """A progress bar on standard error for (phase, done, total); lines now and then in a log."""
    if quiet:
        yield None
        return
    if not err.is_terminal:
        yield _Lines()
        return
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    with _bars(MofNCompleteColumn(), TimeRemainingColumn()) as bars:
        task = bars.add_task("start", total=None)
        phase_shown = ""

        def on_progress(phase: str, done: int, total: int) -> None:
            nonlocal phase_shown
            if phase != phase_shown:
                bars.reset(task, description=phase, total=total)
                phase_shown = phase
            bars.update(task, completed=done, total=total)

        yield on_progress


def _bars(*columns: ProgressColumn) -> Progress:
    """Bars that are gone afterwards, with these columns behind them."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    what = TextColumn("{task.description}", markup=False)
    return Progress(SpinnerColumn(), what, BarColumn(), *columns, console=err, transient=True)


class _Lines:
    """How far a long computation is, in a line each half minute, for a log."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST_LINE_SECONDS
        self._phase = ""
        self._began = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase or done == 0:
            self._phase, self._began = phase, now
        if now < self._next:
            return
        self._next = now + LINE_SECONDS
        left = ""
        if 0 < done < total:
            left = f", {_left_of((now - self._began) / done * (total - done))} of this"
        err.print(f"{phase}: {done} of {total}{left}")


SIMULATION = {
    "provision": "provisioning: keys and certificates for the server and each site",
    "start": "starting the server, and a FLARE client and a trainer for each site",
    "submit": "all sites are there; submitting the job",
    "fetch": "fetching the result",
}


@contextlib.contextmanager
def watching(
    quiet: bool, said: Mapping[str, str] = SIMULATION, as_json: bool = False
) -> Iterator[Callable[[Event], None] | None]:
    """Lines for what has happened, and a screen for what happens now, on standard error.

    In a log, where nobody sees a screen, lines alone, one each few seconds.

    Args:
        quiet: show nothing.
        said: a line for each phase that is worth one.
        as_json: instead of all that, one JSON object a line on standard output for each event.
    """
    if as_json:
        yield _print_event
        return
    if quiet:
        yield None
        return
    from fedfms.cli.screen import Screen, StatusLines

    if not err.is_terminal:
        lines = StatusLines(err.print)
        log_event = logging_progress(said, lines.say)
        lines.start()

        def write(event: Event) -> None:
            lines.show(event)
            log_event(event)

        try:
            yield write
        finally:
            lines.stop()
        return
    from rich.live import Live

    screen = Screen()
    with Live(screen, console=err, refresh_per_second=4, transient=True) as live:
        tell = _teller(live.console.print, said)

        def show(event: Event) -> None:
            tell(event)
            screen.show(event)

        yield show


def _print_event(event: Event) -> None:
    out.print(json.dumps({"event": {**event.to_dict(), "text": event.text}}))


def logging_progress(
    said: Mapping[str, str], print_line: Callable[[str], None] = err.print
) -> Callable[[Event], None]:
    """As `watching`, in lines alone and each thing once: for a log, where nobody sees a screen."""
    tell = _teller(print_line, said)
    before = ("", -1)

    def on_event(event: Event) -> None:
        nonlocal before
        tell(event)
        now = _now(event)
        if now is not None and event.answered and (now, len(event.answered)) != before:
            before = (now, len(event.answered))
            left = f"; {text}" if (text := _left(event)) else ""
            print_line(
                f"{now}: {len(event.answered)} of {len(event.sites)} sites in "
                f"({', '.join(event.answered)}){left}"
            )

    return on_event


def _teller(print_line: Callable[[str], None], said: Mapping[str, str]) -> Callable[[Event], None]:
    """Prints what has happened, each thing once."""
    told: set[str] = set()

    def once(text: str) -> None:
        if text and text not in told:
            told.add(text)
            print_line(text)

    def tell(event: Event) -> None:
        once(said.get(event.phase, ""))
        if event.text:
            print_line(event.text)
        for finished in event.finished:
            once(_round_line(finished, event))
        for text in (*event.missed, *event.notes):
            once(text)
        if event.phase == "evaluate":
            trained = event.round is not None
            models = "training is done; every site evaluates the final and the best model"
            once(models if trained else "every site evaluates the model")

    return tell


def _now(event: Event) -> str | None:
    """What the sites are at."""
    if event.phase == "evaluate":
        return "final evaluation"
    return f"round {event.round}" if event.phase == "train" and event.round is not None else None


def _left(event: Event) -> str:
    from fedfms.cli.screen import time_left

    return time_left(event)


def _left_of(seconds: float) -> str:
    if seconds < 100:
        return f"about {seconds:.0f} s left"
    return (
        f"about {seconds / 60:.0f} min left"
        if seconds < 6000
        else f"about {seconds / 3600:.1f} h left"
    )


def _round_line(done: FinishedRound, event: Event) -> str:
    answered = (
        f"round {done.number} ({done.number + 1} of {event.rounds}): {done.answered} of "
        f"{len(event.sites)} sites"
    )
    if not done.evaluated:
        return f"{answered}; not evaluated"
    what = "mean validation Dice of the model that it started from"
    if done.by_class:  # a mean over classes would be of other classes at other sites
        told = "; ".join(
            f"{name} {mean:.3f} ({over} of {done.training} training sites)"
            for name, mean, over in done.by_class
        )
        return f"{answered}; {what}: {told}"
    dice = "withheld" if done.dice is None else f"{done.dice:.3f}"
    if done.told < done.training and done.dice is not None:
        dice += f" ({done.told} of {done.training} training sites)"
    return f"{answered}; {what}: {dice}"


def show_result(folder: Path, as_json: bool) -> None:
    """The last word of a run: a table of Dice by site, and where the report is."""
    from fedfms.report.collect import load_result, summary_table
    from fedfms.report.words import class_names, missed_evaluations, silent_sites

    rows, summary = summary_table(folder), load_result(folder).summary
    by_class = any(row["class"] for row in rows)
    if as_json:
        said = {"results": str(folder), "sites": rows, "summary": summary.to_dict()}
        out.print(json.dumps(said))  # one line, after those of its events
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        title="Dice at native resolution: mean over a site's validation cases"
        + (", class by class" if by_class else ""),
        caption=(
            "Round 0 is before training; missed counts rounds. "
            "An unseen site never trained; all its cases are evaluated."
            + (" Not all scores are of the same classes." if by_class else "")
        ),
    )
    table.add_column("site")
    if by_class:
        table.add_column("class")
    table.add_column("role")
    for name in ("cases", "round 0", "final", "change", "best"):
        table.add_column(name, justify="right")
    table.add_column("missed", justify="right")
    for row in rows:
        scores = [_score(row[key]) for key in ("dice_before", "dice_after")]
        change = "–" if row["change"] is None else f"{row['change']:+.3f}"
        role = "trains" if row["role"] == "train" else "unseen"
        named = [row["site"], row["class"]] if by_class else [row["site"]]
        cells = [*named, role, str(row["cases"] or "–"), *scores, change]
        table.add_row(*cells, _score(row["dice_best"]), str(row["missed"]))
    out.print(WholeWords(table))
    training = len(summary.training)
    for part in summary.parts:
        gain = part.dice.gain  # over the training sites that have both
        if gain.before is not None and gain.after is not None:  # not of an evaluation alone
            before, after = _score(gain.before), _score(gain.after)
            who = "the training sites"
            if len(gain.sites) < training:
                who = f"{len(gain.sites)} of {training} training sites"
            what = f", {part.classes[0]}" if by_class else ""
            out.print(f"mean of {who}{what}: {before} before, {after} after")
    for site, values in summary.sites.items():
        if values.not_annotated:
            out.print(f"{site} does not annotate {class_names(values.not_annotated)}")
    for site, models in missed_evaluations(summary).items():
        out.print(f"{site} did not evaluate {models}")
    for site in silent_sites(summary):
        out.print(f"nothing of {site} is in this model: no answer of it was accepted")
    out.print(f"report: {folder / 'report.html'}")


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
