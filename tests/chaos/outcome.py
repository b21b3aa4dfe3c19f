"""What a disturbed run left: its rounds, what each fault cost, and whether every file is whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fedfms.exchange.tensors import load_tensors
from fedfms.files import file_sha256

Record = dict[str, Any]
# FLARE's own, in a folder that it removes: a log of lines, and figures that nobody reads
OF_FLARE = ("log.json", "stats_pool_summary.json")


class Fault(Protocol):
    """See schedules.Fault."""

    site: str


class Done(Protocol):
    """See run.Done."""

    fault: Fault
    time: float
    up: float | None


def read_lines(path: Path) -> list[Record]:
    """Records, without a line that is just being written; none where there is no file."""
    try:
        lines = path.read_text().split("\n")[:-1]
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def counted(records: Iterable[Record]) -> tuple[list[int], set[tuple[int, str]]]:
    """Rounds that were done, in order, and (round, site) of each answer that was used."""
    rounds: list[int] = []
    answers: set[tuple[int, str]] = set()
    for record in records:
        if record["record"] == "resumed":  # what came before of these rounds does not count
            rounds = [number for number in rounds if number < record["round"]]
            answers = {(number, site) for number, site in answers if number < record["round"]}
        elif record["record"] == "round_done":
            rounds.append(record["round"])
            answers |= {(record["round"], site) for site in record["sites"]}
    return rounds, answers


def round_seconds(records: Iterable[Record]) -> list[int]:
    """How long each round took, from its first start to its last end."""
    started: dict[int, float] = {}
    ended: dict[int, float] = {}
    for record in records:
        if record["record"] == "round_started":
            started.setdefault(record["round"], record["time"])
        elif record["record"] == "round_done":
            ended[record["round"]] = record["time"]
    return [round(ended[number] - started[number]) for number in sorted(ended)]


def training(records: Sequence[Record], site: str | None) -> bool:
    """Whether a round is open that this site, or any of them, has not answered yet."""
    is_open, answered, sites = False, set(), set()
    for record in records:
        match record["record"]:
            case "job":
                sites = set(record["sites"])
            case "round_started" | "resumed":
                is_open, answered = record["record"] == "round_started", set()
            case "contribution":
                answered.add(record["site"])
            case "round_done":
                is_open = False
    return is_open and (site not in answered if site else bool(sites - answered))


def effects(records: Sequence[Record], done: Iterable[Done]) -> list[dict[str, object]]:
    """What each fault cost; seconds are from the fault, and `waited` from the process being up.

    At a site it is over with the next answer of that site that is used, at the server with
    anybody's.
    """
    found: list[dict[str, object]] = []
    for one in done:
        site = one.fault.site
        later = [record for record in records if (record.get("time") or 0.0) > one.time]
        said = [
            record
            for record in later
            if record["record"] in ("note", "resumed") and (not site or record.get("site") == site)
        ]
        answers = [
            record
            for record in later
            if record["record"] == "contribution"
            and record["accepted"]
            and site in ("", record["site"])
        ]
        back = answers[0]["time"] if answers else None
        found.append(
            {
                "fault": str(one.fault),
                "noticed": round(said[0]["time"] - one.time, 1) if said else None,
                "said": said[0].get("text", "resumed") if said else None,
                "up": round(one.up - one.time, 1) if one.up else None,
                "answer": round(back - one.time, 1) if back else None,
                "waited": round(back - one.up, 1) if back and one.up else None,
                "reasons": sorted(
                    {
                        reason
                        for record in later
                        if record["record"] == "round_done" and (not back or record["time"] < back)
                        for name, reason in record["missed"].items()
                        if site in ("", name)
                    }
                ),
            }
        )
    return found


def damaged_files(folder: Path) -> list[str]:
    """Files below a folder that are not what their names promise, with what is wrong."""
    damaged = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink() or path.name in OF_FLARE:
            continue
        try:
            _read(path)
        except Exception as error:
            damaged.append(f"{path}: {type(error).__name__} {error}"[:300])
    return damaged


def _read(path: Path) -> None:
    match path.suffix:
        case ".safetensors":
            if not load_tensors(path):
                raise ValueError("it holds nothing")
        case ".json":
            values = json.loads(path.read_text())
            if path.name == "state.json":
                for name, sha256 in values["sha256"].items():
                    if file_sha256(path.with_name(name)) != sha256:
                        raise ValueError(f"{name} is not what was written")
        case ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)
        case ".pt":
            torch.load(path, map_location="cpu", weights_only=True)
        case ".zip":
            with zipfile.ZipFile(path) as archive:
                if (bad := archive.testzip()) is not None:
                    raise ValueError(f"{bad} is damaged")
