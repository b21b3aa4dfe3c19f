"""A coordinator with an admin's kit against a running federation: submit, refuse, abort, fetch.

One federation of two sites serves all tests of this file; they come in the order of a working day.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from console import console
from federations import (
    JOBS,
    POLICY,
    of_kind,
    processes_below,
    read_records,
    wait_until,
    write_sites,
)

from fedfms.contracts.announcement import Announcement
from fedfms.contracts.policy import Bounds
from fedfms.errors import ConfigError, FederationError
from fedfms.flare.lint import check_announcements
from fedfms.flare.session import (
    Coordinator,
    connect,
    new_copy,
    prepare_job,
)
from fedfms.flare.simulate import (
    ADMIN,
    HEART_BEAT_SECONDS,
    SERVER,
    Federation,
)
from fedfms.local.processes import Processes
from fedfms.local.sites import find_sites

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LOOKER, LEAD = "looker@fedfms.local", "lead@fedfms.local"
BOUNDS = {field.name for field in dataclasses.fields(Bounds)}
BIN = Path(sys.executable).parent


@dataclass
class Running:
    """The federation, and the commands of its coordinator."""

    root: Path
    federation: Federation
    coordinator: Coordinator

    def start(self, *words: object, admin: str = ADMIN) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(BIN / "fedfms"), *map(str, words)],
            cwd=self.root,
            env={**os.environ, "FEDFMS_KIT": str(self.kit(admin)), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell starts what is in its background with Ctrl-C ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(
        self, *words: object, admin: str = ADMIN, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, admin=admin)
        output, error = process.communicate(timeout=120)
        assert process.returncode == code, f"{words}: {output}{error}"
        return subprocess.CompletedProcess(words, code, output, error)

    def json(self, *words: object) -> Any:
        return json.loads(self.run(*words, "--json").stdout)

    def kit(self, name: str) -> Path:
        return self.federation.kit(name)

    def told(self, site: str) -> Announcement:
        return {one.site: one for one in self.coordinator.announcements()}[site]

    def submit_with_nvflare(self, job: Path) -> str:
        """FLARE's own command on a job folder as it is; a copy, since it may be signed in place."""
        copy = self.root / "by-nvflare" / job.name
        shutil.copytree(job, copy)
        done = subprocess.run(
            [
                *(str(BIN / "nvflare"), "job", "submit", "-j", str(copy)),
                *("--startup-kit", str(self.kit(ADMIN))),
            ],
            env={**os.environ, "HOME": str(self.root)},  # it keeps settings there
            capture_output=True,
            text=True,
            timeout=60,
        )
        found = re.search(r"job_id: ([0-9a-f-]{36})", done.stdout)
        assert found, done.stdout + done.stderr
        return found.group(1)

    @contextlib.contextmanager
    def site_file(self, site: str, name: str, text: str) -> Iterator[None]:
        """Another text in a file of a site, for a while."""
        path = self.root / "sites" / site / name
        before = path.read_text()
        path.write_text(text)
        try:
            yield
        finally:
            path.write_text(before)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("day")
    sites = write_sites(root / "sites", ("site-1", "site-2"))
    recipe = prepare_job(JOBS / "fedmsa", root / "job").recipe
    admins = {ADMIN: "project_admin", LEAD: "lead", LOOKER: "member"}
    federation = Federation(
        root / "run", find_sites(sites, None), recipe, None, lambda event: None, admins
    )
    with federation.running() as coordinator:
        yield Running(root, federation, coordinator)


# ------------------------------------------------------------------------------ announcements


def test_a_site_announces_what_it_can_do_and_a_member_sees_it(running: Running) -> None:
    with connect(running.kit(LOOKER)) as looker:
        assert (looker.admin.role, looker.admin.organization) == ("member", "coordinator")
        wait_until(lambda: all(one.ready for one in looker.announcements()), 60, "trainers answer")
        wait_until(lambda: all(one.about_slices for one in looker.announcements()), 60, "looked")
        told = looker.announcements()
    assert [one.site for one in told] == ["site-1", "site-2"]
    assert told[0] == Announcement(
        site="site-1",
        version=told[0].version,
        classes=("lesion",),
        methods=("fedsam", "fedmsa", "lora"),
        max_rounds=1000,
        device=told[0].device,
        slicing=told[0].slicing,
        certificate_ends=told[0].certificate_ends,
        gpu="none" if told[0].device == "cpu" else told[0].gpu,
        bounds=Bounds(**{key: value for key, value in POLICY.items() if key in BOUNDS}),
        about_slices=10,  # 5 of its 7 cases, of 2 slices each
        trainer_key=told[0].trainer_key,
    )
    assert told[0].trainer_key is not None
    assert told[0].certificate_ends is not None
    assert told[0].slicing is not None
    assert told[0].slicing.channels == "gray"
    assert told[0].device in ("cpu", "cuda")


def test_site_yml_and_policy_are_told_as_they_are_now(running: Running) -> None:
    policy = json.dumps({**POLICY, "methods": ["fedmsa"], "max_rounds": 4})
    with running.site_file("site-2", "policy/privacy.json", policy):
        told = running.told("site-2")
        assert (told.ready, told.methods, told.max_rounds) == (True, ("fedmsa",), 4)
    with running.site_file("site-2", "site.yml", "images: phantom-0/*.nii.gz\n"):
        told = running.told("site-2")
        assert (told.ready, told.fault, told.classes) == (False, "config", ())
        assert "phantom" not in repr(told)
        said = running.run("status").stdout
        assert "site-2 is not ready (config): its site.yml cannot be used" in said
        assert "at site-1" in next(line for line in said.splitlines() if "slices:" in line)
    assert running.told("site-2").ready


# --------------------------------------------------------------------------------- refusals


def test_everything_that_keeps_a_job_from_running_is_said_at_once(running: Running) -> None:
    site = yaml.safe_load((running.root / "sites/site-2/site.yml").read_text())
    text = yaml.safe_dump({**site, "classes": {"vessel": [1]}, "device": "cpu"})
    with running.site_file("site-2", "site.yml", text):
        refused = running.run(
            *("submit", JOBS / "fedmsa", "--gpu", "--set", "holdout=site-9"),
            *("--set", "min_clients=3", "--set", "rounds=2000"),
            code=1,
        ).stderr
    for part in (
        "things keep this job from running:",
        "holdout names site-9, which is not connected",
        "needs 3 training sites, and 2 can take part; fix: connect more sites, or allow fewer with "
        "--set min_clients=2",
        "site-1 allows 1000 rounds, the recipe has 2000; fix: submit with --set rounds=1000",
        "site-2 does not know class lesion; it has vessel",
        "site-2 has no GPU, and the job requires one",
    ):
        assert part in refused
    assert running.coordinator.jobs() == []


def test_a_site_that_is_not_ready_is_named_and_can_be_left_out(running: Running) -> None:
    with running.site_file("site-2", "policy/privacy.json", "{"):
        with pytest.raises(ConfigError) as error:
            job = prepare_job(JOBS / "fedmsa", new_copy(JOBS / "fedmsa", running.root))
            check_announcements(job, running.coordinator.announcements())
        assert "site-2 is not ready (no-policy): its policy cannot be used" in error.value.problem
        assert "--without site-2" in error.value.fix
        refused = running.run("submit", JOBS / "fedmsa", "--without", "site-2", code=1).stderr
        assert "needs 2 training sites, and 1 can take part" in refused
        assert "--set min_clients=1" in refused


def test_a_results_folder_that_cannot_be_written_stops_before_the_job(running: Running) -> None:
    (running.root / "file").write_text("")
    refused = running.run(
        "submit", JOBS / "fedmsa", "--watch", "--results", "file/below", code=1
    ).stderr
    assert "file cannot be written" in refused
    assert running.coordinator.jobs() == []


def test_a_member_may_look_and_may_not_submit(running: Running) -> None:
    # and hears it before anything that is wrong with the job
    unknown = ("--set", "holdout=site-9")
    refused = running.run("submit", JOBS / "fedmsa", *unknown, admin=LOOKER, code=1).stderr
    assert "site-9" not in refused
    assert f"cannot submit the job: {LOOKER} has the role member" in refused
    assert "project_admin, lead" in refused
    assert running.coordinator.jobs() == []


# ------------------------------------------------------------------------------------- jobs


def test_submit_and_watch_writes_the_results_and_reads_well_in_a_log(running: Running) -> None:
    done = running.run(
        *("submit", JOBS / "fedmsa", "--set", "rounds=1", "--watch", "--wait-for", "2"),
        *("--results", "results"),
    )
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"submitted as [0-9a-f-]{36} to site-1, site-2", lines[0])
    assert any(
        re.fullmatch(r"round 0 \(1 of 1\): 2 of 2 sites; mean validation Dice .*: 0\.\d+", line)
        for line in lines
    )
    assert all(line.strip() for line in lines)
    assert "\x1b" not in done.stderr
    assert "mean of the training sites" in done.stdout
    results = running.root / "results"
    assert {"report.html", "global_model.safetensors", "recipe.json"} <= {
        path.name for path in results.iterdir()
    }
    assert [r["status"] for r in of_kind(read_records(results), "job_done")] == ["completed"]
    assert [path.name for path in running.root.glob(".results*")] == []


def test_a_door_that_closes_is_heard_at_the_site_and_by_the_coordinator(running: Running) -> None:
    """The job is submitted by FLARE's own command, which compares it with nothing."""
    policy = json.dumps({**POLICY, "max_rounds": 5})  # the job has 6
    said = (
        "site-2 in round 0: its policy does not allow so many rounds (too-many-rounds); "
        "fix: ask the site whether its policy (privacy.json) means this"
    )
    with running.site_file("site-2", "policy/privacy.json", policy):
        job_id = running.submit_with_nvflare(JOBS / "fedmsa")
        watched = running.run("watch", job_id[:8], code=1).stderr
        assert said in watched
    fetched = running.run("fetch", job_id, "--results", "failed", code=1)
    assert said in fetched.stderr
    assert (running.root / "failed" / "report.html").is_file()
    work = running.federation.run / "sites" / "site-2"
    sentence = "the site's policy allows at most 5 rounds (max_rounds), and rounds is 6"
    assert sentence in (work / "errors.log").read_text()
    log = (running.federation.logs / "site-2.trainer.log").read_text()
    assert "DoorClosed (too-many-rounds)" in log


def test_a_job_of_flares_console_finishes_and_can_be_fetched(running: Running) -> None:
    job = running.kit(ADMIN) / "transfer" / "evaluate"  # where the console looks
    job.parent.mkdir(exist_ok=True)
    shutil.copytree(JOBS / "evaluate", job)
    for name, source in (("model.safetensors", "global_model.safetensors"), ("recipe.json",) * 2):
        shutil.copyfile(running.root / "results" / source, job / "app" / "config" / name)
    with console(running.kit(ADMIN), ADMIN) as terminal:
        terminal.type("submit_job evaluate")
        job_id = terminal.wait_for(r"Submitted job: ([0-9a-f-]{36})").group(1)
        terminal.wait_for("> ")
        terminal.type(f"list_jobs {job_id}")
        terminal.wait_for(rf"\| {job_id} +\| evaluate ")
    watched = running.run("watch", job_id[:8])
    assert f"fedfms fetch {job_id[:8]}" in watched.stdout
    with (
        connect(running.kit(LEAD)) as lead,
        pytest.raises(FederationError, match="lead, which does not allow it here") as error,
    ):
        lead.download(job_id, running.root / "not-theirs")
    assert "lead for their own jobs" in error.value.fix
    running.run("fetch", job_id[:8], "--results", "evaluated")
    records = read_records(running.root / "evaluated")
    assert {r["site"] for r in of_kind(records, "evaluation")} == {"site-1", "site-2"}


# --------------------------------------------------------------------------- sites and server


def test_a_site_is_shut_out_and_let_in_again_and_the_other_goes_on(running: Running) -> None:
    running.run("revoke", "site-2")
    wait_until(lambda: running.coordinator.sites() == ["site-1"], 20, "site-2 is gone")
    time.sleep(2 * HEART_BEAT_SECONDS)  # it has tried to come back
    assert running.coordinator.sites() == ["site-1"]
    running.run("readmit", "site-2")
    wait_until(lambda: running.coordinator.sites() == ["site-1", "site-2"], 60, "site-2 is back")


def test_ctrl_c_ends_the_watching_abort_a_job_and_a_new_server_goes_on_with_the_one_that_ran(
    running: Running,
) -> None:
    submitted = running.json(
        "submit", JOBS / "fedmsa", "--set", "rounds=50", "--set", "local_epochs=500"
    )
    job_id = submitted["job_id"]
    assert submitted["sites"] == ["site-1", "site-2"]
    wait_until(lambda: running.coordinator.event(job_id), 60, "the job runs")
    watching = running.start("watch", job_id[:8])
    waiting = running.json("submit", JOBS / "fedmsa")["job_id"]  # in the meantime
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=20)
    assert watching.returncode == 130
    assert f"the job goes on: fedfms watch {job_id[:8]}" in said
    values = running.json("status")
    states = {job["job_id"]: job["status"] for job in values["jobs"]}
    assert (states[job_id], states[waiting]) == ("RUNNING", "SUBMITTED")
    early = running.run("fetch", job_id[:8], code=1).stderr
    assert f"{job_id} has not finished: RUNNING" in early
    running.run("stop", waiting[:8])
    wait_until(lambda: running.coordinator.state(waiting).is_finished, 20, "it is aborted")
    assert running.coordinator.state(waiting).status == "FINISHED:ABORTED"

    with a_new_server(running):

        def state() -> str:
            with contextlib.suppress(FederationError), connect(running.kit(ADMIN), 3.0) as session:
                return session.state(job_id).status
            return ""

        wait_until(lambda: state() == "SUBMITTED", 60, "the new server takes it up")
        wait_until(lambda: state() == "RUNNING", 60, "it runs again")
        running.run("abort", job_id[:8])
        wait_until(lambda: state() == "FINISHED:ABORTED", 60, "it can be ended")


@contextlib.contextmanager
def a_new_server(running: Running) -> Iterator[None]:
    """`kill -9` the server and its job, and start it again as it was."""
    of_server = [
        process
        for process in processes_below(running.root)
        if f"/{SERVER}" in " ".join(process.cmdline())
    ]
    first = next(p for p in of_server if "server.server_train" in " ".join(p.cmdline()))
    command, folder, environment = first.cmdline(), Path(first.cwd()), first.environ()
    for process in of_server:
        process.kill()
    with Processes() as processes:
        log = running.root / "server-again.log"
        processes.start("server", command, folder=folder, log_file=log, environment=environment)
        yield
