"""A federation that is watched: the page over HTTP, metrics at the server, each site's own page."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from federations import JOBS, read_records, write_sites

from fedfms.flare.session import connect, prepare_job
from fedfms.flare.simulate import ADMIN, Federation, free_port
from fedfms.local.sites import find_sites
from fedfms.records.schema import RoundDone
from fedfms.trainer.ledger import LEDGER, PAGE, read_ledger
from fedfms.watch.known import Watcher, watcher_of
from fedfms.watch.page import Pages
from fedfms.watch.serve import PageServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = ("rounds=3", "image_size=64", "local_epochs=30")


@dataclass
class Watched:
    """What was seen of one run."""

    root: Path
    job_id: str = ""
    status: str = ""
    watcher: Watcher | None = None
    pages: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    fetched: Path = Path()


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("watched")
    seen = Watched(root)
    sites = find_sites(write_sites(root / "sites", ("site-1", "site-2")), None)
    job = prepare_job(JOBS / "fedmsa", root / "job" / "fedmsa", SETTINGS)
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("FEDFMS_METRICS_PORT", str(port))
        federation = Federation(root / "run", sites, job.recipe, None, lambda event: None)
        coordinator = stack.enter_context(federation.running())
        seen.watcher = watcher_of(federation.kit(ADMIN), None)
        server = PageServer(Pages(lambda: seen.watcher.known), port=0)  # type: ignore[union-attr]
        seen.watcher.start()
        stack.callback(seen.watcher.stop)
        stack.enter_context(server.in_background())
        seen.job_id = federation.submit(coordinator, job.folder)
        deadline = time.monotonic() + 300
        while not (state := coordinator.state(seen.job_id)).is_finished:
            assert time.monotonic() < deadline, state
            federation._look()
            time.sleep(1)
            if f'href="run/{seen.job_id}/"' in get(server.url):
                seen.pages.append(get(f"{server.url}run/{seen.job_id}/"))
            seen.metrics.append(get(f"http://127.0.0.1:{port}/metrics"))
        seen.status = state.status
        deadline = time.monotonic() + 30
        while "The run is complete." not in (page := get(f"{server.url}run/{seen.job_id}/")):
            assert time.monotonic() < deadline, page
            time.sleep(1)
        seen.pages.append(page)
        with connect(federation.kit(ADMIN)) as session:
            seen.fetched = session.download(seen.job_id, root / "fetched")
        yield seen


def test_the_page_showed_the_run_while_it_went_on(watched: Watched) -> None:
    assert watched.status == "FINISHED:COMPLETED"
    while_it_ran = [page for page in watched.pages if "of 3 runs:" in page]
    assert while_it_ran and 'scope="row">site-2' in while_it_ran[-1]
    assert any("Segment Anything learns lesion" in page for page in while_it_ran)
    assert any("<h3>Dice</h3><svg" in page for page in watched.pages)  # of records, not of events
    assert "fedfms fetch" in watched.pages[-1]


def test_the_records_that_came_over_are_the_runs_own(watched: Watched) -> None:
    assert watched.watcher is not None
    (run,) = watched.watcher.known.runs
    rounds = [one.round for one in run.records if isinstance(one, RoundDone)]
    assert rounds == [0, 1, 2]
    kinds = [record["record"] for record in read_records(watched.fetched)]
    assert [one.record for one in run.records] == kinds[: len(run.records)]
    assert run.recipe["rounds"] == 3
    assert watched.watcher.known.records_told
    assert {"site-1's certificate", "site-2's certificate"} <= set(
        watched.watcher.known.certificates
    )


def test_metrics_followed_it(watched: Watched) -> None:
    told = "\n".join(watched.metrics)
    assert f'fedfms_run_rounds{{run="{watched.job_id}"}} 3.0' in told
    assert "fedfms_connected_sites 2.0" in told
    assert f'fedfms_site_connected{{run="{watched.job_id}",site="site-1"}} 1.0' in told


def test_each_site_wrote_down_what_it_was_asked_and_what_left(watched: Watched) -> None:
    ledgers = list(watched.root.rglob(LEDGER))
    assert len(ledgers) == 2
    for path in ledgers:
        entries = read_ledger(path.parent)
        left = [one for one in entries if one.event == "left"]
        assert [(one.kind, one.round) for one in left][:3] == [("train", n) for n in range(3)]
        assert {one.job for one in entries} == {watched.job_id}
        assert {one.submitter for one in entries} == {ADMIN}
        assert "submitted by " + ADMIN in (path.parent / PAGE).read_text()
