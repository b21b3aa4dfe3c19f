"""`--notify COMMAND`: who watches is told by a command of theirs what befalls a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedfms.flare.follow import OnEvent
    from fedfms.flare.progress import Event
    from fedfms.flare.session import JobState
    from fedfms.notify import Notifier

Notify = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND",
        help="Run this with a sentence as its last argument: when the run waits for sites, goes "
        "on, or ends.",
    ),
]


def notifier_of(command: str | None) -> Notifier | None:
    """What tells, if it is asked for.

    Raises:
        ConfigError: there is no such command; before anything is done.
    """
    from fedfms.notify import Notifier

    return Notifier(command) if command is not None else None


def telling(notifier: Notifier | None, job_id: str, tell: OnEvent) -> OnEvent:
    """Show each event, and tell what is new of waits and of going on."""
    if notifier is None:
        return tell
    told = 0

    def on_event(event: Event) -> None:
        nonlocal told
        tell(event)
        for text in event.alarms[told:]:
            notifier.tell(f"run {job_id[:8]}: {text}")
        told = max(told, len(event.alarms))

    return on_event


def tell_end(notifier: Notifier | None, state: JobState) -> None:
    """Tell that a run is over, and wait until it is told."""
    if notifier is None:
        return
    short = state.job_id[:8]
    said = f"it ended without being done; see fedfms runs, and fedfms fetch {short}"
    if state.is_completed:
        said = f"it is completed: fedfms fetch {short}"
    elif state.is_aborted:
        said = f"it was stopped; it goes on with fedfms resume {short}"
    notifier.tell(f"run {short}: {said}")
    notifier.close()
