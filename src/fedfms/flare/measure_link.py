"""Measuring the line between a site and its server: bytes over a connection of FLARE.

The site asks as it would ask for the server's greeting (challenge.py), with the kit's certificate
and through the same proxy, under a name beside its own: its FLARE client may run meanwhile or not.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from fedfms.bounded import number
from fedfms.errors import ConfigError, Undecodable
from fedfms.flare.challenge import conversation
from fedfms.flare.internals import wire
from fedfms.flare.link import HEADER, PIECE, REFUSED, TOLD, WAIT
from fedfms.kits.kit import Kit
from fedfms.preflight.link import Line
from fedfms.preflight.network import NetworkError

FIRST_PIECE = 64 * 1024  # bytes
ENOUGH_SECONDS = 3.0  # a piece that took so long says what the line carries
SLOWEST = 0.01e6  # bytes a second; a slower line is no line
ROUND_TRIPS = 5


def measure(kit: Kit, on_step: Callable[[str], None] = lambda text: None) -> Line:
    """Measure the line from here to the kit's server; it takes 2 to 30 seconds.

    Args:
        on_step: told what is measured next.

    Raises:
        NetworkError: code flare (no server), link-busy (its budget is used up, with when it has one
            again), link-slow (less than 10 kB/s), no-link (a server of another version).
        ConfigError: code revoked.
    """
    with conversation(kit) as (ask, _):
        told: list[float] = []

        def carry(down: int = 0, up: int = 0) -> float:
            """Seconds until so many bytes were there, or here."""
            payload = os.urandom(up) if up else None
            limit = 10.0 + (down + up) / SLOWEST
            began = time.monotonic()
            answer = ask(limit, {HEADER: down}, payload)
            seconds = time.monotonic() - began
            _check(answer, down, up)
            told.append(_seconds(answer.headers.get(TOLD)))
            return seconds

        on_step("there and back")
        trip = statistics.median(carry() for _ in range(ROUND_TRIPS))
        on_step("down")
        down = _rate(lambda size: carry(down=size), trip)
        on_step("up")
        up = _rate(lambda size: carry(up=size), trip)
    return Line(down=down / 1e6, up=up / 1e6, round_trip=trip, server_told=told[-1] or None)


def _rate(carry: Callable[[int], float], trip: float) -> float:
    """Bytes a second, from pieces that grow until one takes long enough."""
    size = FIRST_PIECE
    while True:
        seconds = max(carry(size) - trip, 1e-4)
        rate = size / seconds
        if seconds >= ENOUGH_SECONDS or size == PIECE:
            return rate
        size = min(PIECE, max(2 * size, min(8 * size, int(rate * 1.2 * ENOUGH_SECONDS))))


def _seconds(told: Any) -> float:
    """What a server says of a time; 0 where it says none."""
    try:
        return max(0.0, number(told, "a time"))
    except Undecodable:
        return 0.0


def _check(answer: wire.Answer, down: int, up: int) -> None:
    if answer.code != wire.ANSWERED:
        raise NetworkError(
            f"{(down + up) / 1e6:.1f} MB did not reach the other side ({answer.code}): the line "
            f"breaks, or carries less than {SLOWEST / 1e3:.0f} kB a second",
            "try again; if it stays so, ask your network's administrators about this machine's "
            "line to the server",
            code="link-slow",
        )
    if HEADER not in answer.headers:
        raise NetworkError(
            "the server does not measure lines",
            "ask the coordinator which version it runs",
            code="no-link",
        )
    if answer.headers.get(REFUSED) == "revoked":
        raise ConfigError(
            "the coordinator has disabled this site; the server measures no line for it",
            "ask the coordinator",
            code="revoked",
        )
    if REFUSED in answer.headers:
        minutes = max(1, round(_seconds(answer.headers.get(WAIT)) / 60))
        raise NetworkError(
            "the server has measured enough for now, and keeps its line for its runs",
            f"try again in {minutes} min",
            code="link-busy",
        )
    got = len(answer.payload) if isinstance(answer.payload, bytes | bytearray) else 0
    if (got, answer.headers.get(HEADER)) != (down, up):
        raise NetworkError(
            "what came back from the server is not what was asked for",
            "ask the coordinator which version it runs",
            code="no-link",
        )
