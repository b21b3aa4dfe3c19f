"""Who watches a run sees what each site does, and a failure while the round still runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federations import JOBS, wait_until, write_sites

from fedfms.flare.session import prepare_job
from fedfms.flare.simulate import ADMIN, Federation
from fedfms.local.sites import find_sites

sys.path.insert(0, str(Path(__file__).parents[1]))
import itertools

from terminal import Console

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
SITES = ("site-1", "site-3")
EPOCHS = int(os.environ.get("WATCHED_EPOCHS", "240"))  # a round outlasts the start of two commands
SETTINGS = [f"local_epochs={EPOCHS}", "rounds=3", "image_size=64", "min_clients=1"]


class Lines:
    """What a command prints, each line with its time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def wait(self, seconds: float) -> int:
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def longest_silence(self, after: str) -> float:
        """Seconds between two lines, from the first that begins so."""
        texts = [text for _, text in self.lines]
        first = next(n for n, text in enumerate(texts) if text.startswith(after))
        times = [at for at, _ in self.lines[first:]]
        return max(b - a for a, b in itertools.pairwise(times))


def start(root: Path, kit: Path, *words: str) -> Lines:
    return Lines(
        subprocess.Popen(
            [str(BIN / "fedfms"), *words],
            cwd=root,
            env={**os.environ, "FEDFMS_KIT": str(kit), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("watched")
    sites = write_sites(root / "sites", SITES)
    recipe = prepare_job(JOBS / "fedmsa", root / "job").recipe
    one = Federation(root / "run", find_sites(sites, None), recipe, None, lambda event: None)
    with one.running():
        yield one


def events_of(streamed: Lines) -> list[dict[str, Any]]:
    values = [json.loads(text) for _, text in streamed.lines if text.startswith("{")]
    return [value["event"] for value in values if "event" in value]


def of(event: dict[str, Any], site: str) -> dict[str, Any]:
    return next((one for one in event["now"] if one["name"] == site), {})


def test_who_watches_sees_what_sites_do_and_a_failure_at_once(federation: Federation) -> None:
    root, kit = federation.run.parent, federation.kit(ADMIN)
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    streamed = start(
        *(root, kit, "submit", str(JOBS / "fedmsa"), *settings, "--watch", "--json"),
        *("--wait-for", "2"),
    )
    wait_until(lambda: events_of(streamed), 60, "the first event")
    logged = start(root, kit, "watch")  # whatever runs; to ask for its name first takes seconds
    with Console([str(BIN / "fedfms"), "watch"], {"FEDFMS_KIT": str(kit)}) as console:
        console.wait_for(r"round 0 \(1 of 3\), \d+ s: 0 of 2 sites in", 60)
        console.wait_for(r"site-1 .{12} trains \d+ of \d+", 60)
        policy = root / "sites/site-3/policy/privacy.json"
        before = policy.read_text()
        policy.write_text("[")
        wait_until(lambda: any(failed_now(event) for event in events_of(streamed)), 300, "failed")
        policy.write_text(before)
        console.wait_for(r"site-3 .*failed: its policy cannot be used", 30)
        status = start(root, kit, "status", federation_job(root, kit))
        assert status.wait(30) == 0
        assert logged.wait(600) == 0 and streamed.wait(60) == 0
        console.wait_for("has finished", 60)
    events = events_of(streamed)
    told = [one for event in events if (one := of(event, "site-1")).get("phase") == "train"]
    assert any(0 < one["done"] < one["total"] and one["since"] and one["heard"] for one in told)
    shown = [(event["round"], one["done"]) for event in events if (one := of(event, "site-1"))]
    assert len(set(shown)) > 6  # it moves
    failed = next(event for event in events if failed_now(event))
    assert "; fix: ask the site whether its policy" in of(failed, "site-3")["failure"]
    assert of(events[-1], "site-3")["missed"] == 1
    assert any(event["left"] for event in events)
    last = json.loads(streamed.lines[-1][1])
    assert {row["site"] for row in last["sites"]} == set(SITES)
    lines = [text for _, text in logged.lines]
    assert any("site-1 trains " in line for line in lines)
    assert sum("site-3 failed in round" in line for line in lines) == 1
    assert logged.longest_silence("round 0") < 12  # 8 s, and a machine that does much else
    assert any("site-3 failed: its policy" in text for _, text in status.lines)
    print({"log": logged.longest_silence("round 0"), "json": streamed.longest_silence("{")})


def failed_now(event: dict[str, Any]) -> bool:
    """Whether a site's failure is told while another one still trains in that round."""
    return of(event, "site-3").get("phase") == "failed" and of(event, "site-1")["phase"] in (
        *("download", "start", "prepare", "evaluate", "train"),
    )


def federation_job(root: Path, kit: Path) -> str:
    listed = start(root, kit, "status", "--json")
    assert listed.wait(60) == 0
    said = json.loads("\n".join(text for _, text in listed.lines))
    return str(said["jobs"][0]["job_id"])
