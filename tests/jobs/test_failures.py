"""What a federation does when parts of it die, and that it can be stopped at any time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from federations import JOBS, of_kind, processes_below, read_records, wait_until, write_sites

from fedfms.errors import ConfigError, FederationError
from fedfms.flare.progress import Event
from fedfms.flare.simulate import simulate
from fedfms.local.sites import find_sites

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

HELPERS = Path(__file__).parent


def kill_all(workspace: Path, *words: str) -> int:
    """`kill -9` the processes of a simulation whose command line holds all these words."""
    found = [
        process
        for process in processes_below(workspace)
        if all(word in " ".join(process.cmdline()) for word in words)
    ]
    for process in found:
        process.kill()
    return len(found)


class Saboteur:
    """Kills site-2's trainer while it trains in round 0, and all of site-3 in round 2."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.events: list[Event] = []
        self.killed: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.round == 0 and "trainer" not in self.killed:
            self.killed["trainer"] = 0
            threading.Thread(target=self.kill_trainer_in_training).start()
        if event.round == 2 and "site" not in self.killed:
            self.killed["site"] = sum(
                kill_all(self.workspace, word)
                for word in ("uid=site-3", "site-3/startup", "--site site-3")
            )

    def kill_trainer_in_training(self) -> None:
        log = next(self.workspace.glob("*/logs")) / "site-2.trainer.log"
        wait_until(lambda: "scored" in log.read_text(), 60, "site-2 trains")
        self.killed["trainer"] = kill_all(self.workspace, "fedfms.trainer", "--site site-2")


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Saboteur, Path]:
    """Four rounds of FedMSA on three sites, in half precision, with both kinds of death."""
    folder = tmp_path_factory.mktemp("deaths")
    sites = write_sites(folder / "sites", ("site-1", "site-2", "site-3"))
    saboteur = Saboteur(folder / "workspace")
    simulate(
        JOBS / "fedmsa",
        find_sites(sites, None),
        overrides=["rounds=4", "min_clients=1", "local_epochs=3", "transfer_precision=fp16"],
        results=folder / "results",
        workspace=folder / "workspace",
        on_event=saboteur,
    )
    results = folder / "results"
    return read_records(results), saboteur, results


def test_a_killed_trainer_is_asked_once_more_and_its_site_misses_no_round(
    survived: tuple[list[dict], Saboteur, Path],
) -> None:
    records, saboteur, results = survived
    assert saboteur.killed["trainer"] == 1
    rounds = {r["round"]: r for r in of_kind(records, "round_done")}
    assert rounds[0]["sites"] == ["site-1", "site-2", "site-3"]
    assert any("site-2's trainer ended and is started again" in e.text for e in saboteur.events)
    summary = json.loads((results / "summary.json").read_text())
    assert summary["sites"]["site-2"]["missed"] == []


def test_a_site_that_died_as_a_whole_takes_part_again(
    survived: tuple[list[dict], Saboteur, Path],
) -> None:
    records, saboteur, _ = survived
    assert saboteur.killed["site"] >= 3  # FLARE client, its job process, trainer
    rounds = {r["round"]: r for r in of_kind(records, "round_done")}
    assert len(rounds) == 4
    assert "site-3" in rounds[2]["sites"] or "site-3" in rounds[3]["sites"]
    assert rounds[3]["time"] - rounds[2]["time"] < 40
    assert ("site_back", "site-3") in [(n["kind"], n["site"]) for n in of_kind(records, "note")]
    assert of_kind(records, "job_done")[0]["status"] == "completed"
    final = {r["site"]: r for r in of_kind(records, "evaluation") if r["model"] == "final"}
    assert final["site-3"]["contribution"]["round"] == 4


def test_half_precision_halves_the_bytes_and_the_model_stays_whole(
    survived: tuple[list[dict], Saboteur, Path],
) -> None:
    import torch
    from safetensors.torch import load_file

    records, _, results = survived
    model = load_file(results / "global_model.safetensors")
    assert {tensor.dtype for tensor in model.values()} == {torch.float32}
    values = sum(tensor.numel() for tensor in model.values())
    accepted = [r for r in of_kind(records, "contribution") if r["accepted"]]
    assert {(r["bytes_down"], r["bytes_up"]) for r in accepted} == {(2 * values, 2 * values)}


def test_a_site_that_cannot_use_its_files_ends_the_simulation_at_once_with_its_own_words(
    tmp_path: Path,
) -> None:
    sites = write_sites(tmp_path / "sites", ("site-1", "site-2"))
    for label in (sites / "site-2" / "labels").iterdir():
        label.unlink()
    with pytest.raises(FederationError) as error:
        simulate(
            JOBS / "fedmsa",
            find_sites(sites, None),
            overrides=["rounds=2"],
            results=tmp_path / "results",
            workspace=tmp_path / "workspace",
        )
    problem = error.value.problem
    assert problem.startswith("site-2 cannot take part: no file under ")
    assert "matches labels: labels/*.nii.gz" in problem
    assert "compare with: ls " in error.value.fix
    assert "sites/site-2/errors.log" in error.value.fix
    assert "round 1" not in next(tmp_path.rglob("site-1.trainer.log")).read_text()
    assert processes_below(tmp_path) == []
    # nothing of the site's files reaches what the FLARE client and the server log
    logs = [*tmp_path.glob("workspace/*/logs/*.flare.log"), *tmp_path.rglob("server.log")]
    assert len(logs) == 3
    assert not any("phantom-0" in path.read_text() for path in logs)
    errors = next((tmp_path / "workspace").glob("*/sites/site-2/errors.log"))
    assert "phantom-0" in errors.read_text() or "labels" in errors.read_text()


def test_a_broken_site_yml_is_found_before_anything_starts(tmp_path: Path) -> None:
    sites = write_sites(tmp_path / "sites", ("site-1", "site-2"))
    (sites / "site-2" / "site.yml").write_text("images: [")
    with pytest.raises(ConfigError, match=r"site-2/site\.yml"):
        simulate(
            JOBS / "fedmsa",
            find_sites(sites, None),
            results=tmp_path / "results",
            workspace=tmp_path / "workspace",
        )
    assert not list((tmp_path / "workspace").glob("*/kits"))


# ------------------------------------------------------------------------------------- stopping


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A simulation in a process of its own, with long rounds."""
    sites = write_sites(tmp_path / "sites", ("site-1", "site-2"))
    process = subprocess.Popen(
        [
            *(sys.executable, str(HELPERS / "run_simulation.py"), str(JOBS / "fedmsa")),
            *(str(sites), str(tmp_path / "results"), str(tmp_path / "workspace")),
            *("rounds=50", "local_epochs=500"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts what is in its background with Ctrl-C ignored, and so are these tests in CI
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not processes_below(tmp_path), 30, "the watchdog ends the rest")


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith(line):
            return
    pytest.fail(f"it ended before {line!r}, with {process.wait()}")


def test_ctrl_c_in_a_round_stops_everything_within_ten_seconds(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(running, "train 0")
    time.sleep(3)  # the trainers are in the middle of a round
    assert len(processes_below(tmp_path)) >= 8  # server, two clients, job processes, trainers
    started = time.monotonic()
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=30) == 130
    assert time.monotonic() - started < 10
    assert processes_below(tmp_path) == []


def test_sigterm_while_it_starts_stops_everything(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(running, "start")
    wait_until(lambda: len(processes_below(tmp_path)) >= 3, 30, "processes start")
    started = time.monotonic()
    running.terminate()
    assert running.wait(timeout=30) == 130
    assert time.monotonic() - started < 10
    assert processes_below(tmp_path) == []


def test_kill_9_of_the_simulation_leaves_no_process_behind(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(running, "submit")
    assert len(processes_below(tmp_path)) >= 5
    running.kill()
    running.wait()
    wait_until(lambda: not processes_below(tmp_path), 15, "the watchdog ends everything")
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(running.pid)
