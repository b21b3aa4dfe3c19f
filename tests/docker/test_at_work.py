"""What people type while a run goes on: two hospitals and a coordinator, with their kits alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from containers import Project, docker, wait_until
from hospitals import (
    COORDINATOR,
    HOST,
    USER,
    Hospitals,
    free_port,
    hospital_images,
    write_site,
)

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]

SITES = {"scanner-a": "MRN7301-aalto", "scanner-b": "MRN7302-brandt"}
SETTINGS = ("classes=hippocampus", "rounds=6", "local_epochs=6", "min_clients=2")


@dataclass
class WebHook:
    """A chat's address for messages, on this machine."""

    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        texts = self.texts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                texts.append(json.loads(self.rfile.read(length))["text"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@dataclass
class AtWork:
    """A run that goes on at two hospitals."""

    hospitals: Hospitals
    hook: WebHook
    metrics_port: int
    job_id: str = ""

    @property
    def server(self) -> Project:
        return self.hospitals.projects[HOST]

    def rounds_done(self) -> int:
        kept = self.server.volume("server-workspace").glob(f"runs/{self.job_id}/round-*")
        return max((int(path.name[6:]) for path in kept), default=0)

    def metrics(self) -> str:
        address = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.read().decode()

    def run_as_listed(self) -> str:
        """What `fedfms runs` says."""
        return self.hospitals.coordinate("runs", check=False).stdout


def typed(project: Project, *words: object) -> str:
    return project.run(*words).stdout


@pytest.fixture(scope="module")
def at_work(
    image: str, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AtWork]:
    folder = tmp_path_factory.mktemp("work")
    hospitals = Hospitals(folder, image, list(SITES), name="fedfms-work")
    hospitals.provision()
    hospitals.jobs.chmod(0o777)
    hospitals.unzip(COORDINATOR)
    hook, metrics_port = WebHook(), free_port()
    server = hospitals.install(
        HOST,
        SERVER_PUBLISH=hospitals.port,
        COMPOSE_FILE="compose.yml:compose.metrics.yml",
        METRICS_PORT=metrics_port,
        NOTIFY=f'"python /notify/post.py http://{hospitals.address}:{hook.port}/hook"',
    )
    told = (server.folder / "notify/README.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", told, flags=re.DOTALL)
    (server.folder / "notify/post.py").write_text(program)
    for site, prefix in SITES.items():
        source = shared_data / "hippocampus" / site
        data = hospital_images(source, folder / "images" / site, 0, 6, prefix)
        write_site(hospitals.install(site, SITE_DATA=data).folder, site, {"min_cases": 1})
    try:
        for project in hospitals.projects.values():
            project.run("up", "-d")
        work = AtWork(hospitals, hook, metrics_port)
        settings = [part for text in SETTINGS for part in ("--set", text)]
        said = hospitals.coordinate("submit", "fedmsa", *settings, "--wait-for", "2", "--json")
        work.job_id = json.loads(said.stdout[said.stdout.index("{") :])["job_id"]
        wait_until(lambda: work.rounds_done() >= 1, 200, "a round is done")
        yield work
    finally:
        hook.server.shutdown()
        hospitals.down()


def test_the_servers_metrics_are_for_this_machine_alone(at_work: AtWork) -> None:
    assert f'fedfms_run_rounds{{run="{at_work.job_id}"}} 6.0' in at_work.metrics()
    assert "fedfms_connected_sites 2.0" in at_work.metrics()
    published = at_work.server.containers()["server"]["HostConfig"]["PortBindings"]
    assert [one["HostIp"] for one in published["9464/tcp"]] == ["127.0.0.1"]
    assert "MRN73" not in at_work.metrics()


def test_a_site_measures_its_line_while_it_takes_part(at_work: AtWork) -> None:
    said = typed(
        at_work.hospitals.projects["scanner-a"],
        *("run", "--rm", "--no-deps", "scanner-a-flare", "link"),
    )
    print(said)
    assert re.search(r"up, from here +\d+ MB/s", said) and "nothing to write" in said


def test_a_paused_site_is_waited_for_and_somebody_is_told(at_work: AtWork) -> None:
    project = at_work.hospitals.projects["scanner-b"]
    typed(project, "exec", "-T", "scanner-b-flare", "fedfms", "pause")

    def is_told(word: str) -> bool:
        return any(word in text and at_work.job_id[:8] in text for text in at_work.hook.texts)

    wait_until(lambda: is_told("scanner-b"), 120, "somebody is told that the run waits")
    assert "waiting" in at_work.run_as_listed()
    typed(project, "exec", "-T", "scanner-b-flare", "fedfms", "unpause")
    wait_until(lambda: is_told("goes on"), 120, "somebody is told that it goes on")
    print("\n".join(at_work.hook.texts))


def test_the_site_reads_what_was_asked_and_what_left(at_work: AtWork) -> None:
    project = at_work.hospitals.projects["scanner-a"]
    page = typed(project, "exec", "-T", "scanner-a-trainer", "fedfms", "site-page")
    assert at_work.job_id[:8] in page and "train" in page
    html = typed(project, "exec", "-T", "scanner-a-trainer", "fedfms", "site-page", "--html")
    assert html.startswith("<!doctype html>") and at_work.job_id[:8] in html


def test_a_lost_server_comes_back_from_its_archive_on_another_machine(at_work: AtWork) -> None:
    hospitals, server = at_work.hospitals, at_work.server
    wait_until(lambda: at_work.rounds_done() >= 2, 200, "two rounds are done")
    here = ("run", "--rm", "-v", f"{server.folder}:/here")
    print(typed(server, *here, "server", "backup", "/here/server.tar"))
    kept = at_work.rounds_done()
    server.down()

    elsewhere = hospitals.folder / "elsewhere"
    (elsewhere / "checkpoints").mkdir(parents=True)
    for name in ("compose.yml", "compose.metrics.yml", ".env", "server.tar"):
        shutil.copy2(server.folder / name, elsewhere / name)
    shutil.copytree(server.folder / "notify", elsewhere / "notify")
    subprocess.run(["tar", "-xf", "server.tar", "kit"], cwd=elsewhere, check=True)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", elsewhere], check=True)
    another = Project(elsewhere, f"{hospitals.name}-elsewhere")
    hospitals.projects[HOST] = another
    print(
        typed(
            another,
            *here[:2],
            "-v",
            f"{elsewhere}:/here:ro",
            "server",
            "restore",
            "/here/server.tar",
        )
    )
    started = time.monotonic()
    another.run("up", "-d")
    wait_until(lambda: at_work.rounds_done() > kept, 400, "the run goes on")
    print(f"a round more {time.monotonic() - started:.0f} s after the start elsewhere")
    wait_until(lambda: "completed" in at_work.run_as_listed(), 300, "the run is completed")
    hospitals.coordinate("fetch", at_work.job_id, "--results", "/jobs/results")
    lines = (hospitals.jobs / "results/records.jsonl").read_text().splitlines()
    done = [r["round"] for r in map(json.loads, lines) if r["record"] == "round_done"]
    assert done == list(range(6))
    assert any(f"fedfms fetch {at_work.job_id[:8]}" in text for text in at_work.hook.texts)
    assert docker("ps", "-q", "--filter", f"name={server.name}-server") == ""
