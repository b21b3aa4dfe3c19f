"""What Prometheus gets of runs, over HTTP, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from prometheus_client.parser import text_string_to_metric_families

from fedfms.contracts.machine import Machine
from fedfms.errors import ConfigError
from fedfms.flare.metrics import Metrics, Seen, SeenRun
from fedfms.flare.prometheus import RunCollector, serve
from fedfms.flare.simulate import free_port
from fedfms.provisioning.render import TEMPLATES
from fedfms.records.history import History

sys.path.append(str(Path(__file__).parents[1] / "watch"))
sys.path.append(str(Path(__file__).parents[2] / "jobs"))
from flare_context import Engine
from pretended_runs import JOB_ID, NOW, disturbed, healthy

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def seen() -> Seen:
    runs = []
    for known, job_id in (
        (healthy(), JOB_ID),
        (disturbed(), "1b4e28ba-2fa1-41d2-883f-0016d3cca427"),
    ):
        run = known.runs[0]
        assert run.event is not None
        history = History(run.records, {})
        runs.append(SeenRun(job_id, run.event, history, {"server": 1, "site": 2}))
    return Seen(NOW, runs, 4, 30, 100)


@pytest.fixture(scope="module")
def scraped() -> Iterator[Values]:
    port = free_port()
    server, _ = serve(SimpleNamespace(seen=seen()), "127.0.0.1", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    server.shutdown()
    yield {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(scraped: Values, name: str, **labels: str) -> float:
    return scraped[name, tuple(sorted({"run": JOB_ID, **labels}.items()))]


def test_a_run_is_told_in_numbers(scraped: Values) -> None:
    assert value(scraped, "fedfms_run_rounds_done") == 5
    assert value(scraped, "fedfms_run_rounds") == 12
    assert value(scraped, "fedfms_run_left_seconds", bound="to") == 1380
    assert value(scraped, "fedfms_run_waits") == 0
    assert value(scraped, "fedfms_run_waits", run="1b4e28ba-2fa1-41d2-883f-0016d3cca427") == 1
    assert value(scraped, "fedfms_run_restarts_total", of="site") == 2
    assert scraped["fedfms_disk_free_bytes", ()] == 30
    assert scraped["fedfms_runs", ()] == 2


def test_a_site_is_told_in_numbers(scraped: Values) -> None:
    assert value(scraped, "fedfms_site_progress_ratio", site="site-2") == pytest.approx(40 / 120)
    assert value(scraped, "fedfms_site_phase", site="site-2", phase="train") == 1
    assert value(scraped, "fedfms_site_silent_seconds", site="site-2") == pytest.approx(1.0)
    assert value(scraped, "fedfms_site_loss", site="site-2") == pytest.approx(0.26)
    moved = value(scraped, "fedfms_site_moved_bytes_total", site="site-2", direction="down")
    assert moved == 5 * 42_428_928
    assert value(scraped, "fedfms_site_gpu", site="site-2", state="present") == 1
    assert ("fedfms_site_loss", (("run", JOB_ID), ("site", "site-4"))) not in scraped  # unseen


def test_the_dashboard_asks_for_what_there_is() -> None:
    dashboard = json.loads((TEMPLATES / "server/metrics/grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bfedfms_\w+", target["expr"])
    }
    collected = list(RunCollector(SimpleNamespace(seen=seen())).collect())
    told = {sample.name for family in collected for sample in family.samples}
    assert len(asked) > 12 and asked - told == set()
    labels = {label for one in collected for sample in one.samples for label in sample.labels}
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (p["x"] + dx, p["y"] + dy) for p in places for dx in range(p["w"]) for dy in range(p["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


@pytest.mark.parametrize("port", ["0", "70000", "nine"])
def test_a_port_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("FEDFMS_METRICS_PORT", port)
    with pytest.raises(ConfigError, match="FEDFMS_METRICS_PORT"):
        Machine.from_environment()


@pytest.mark.parametrize("hindrance", ["no library", "a taken port"])
def test_what_keeps_metrics_away_does_not_keep_the_server_from_starting(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hindrance: str,
) -> None:
    with socket.socket() as taken, caplog.at_level(logging.ERROR):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if hindrance == "a taken port" else free_port()
        if hindrance == "no library":
            monkeypatch.setitem(sys.modules, "fedfms.flare.prometheus", None)
        monkeypatch.setenv("FEDFMS_METRICS_PORT", str(port))
        engine = Engine(tmp_path, "server", {})
        with engine.new_context() as fl_ctx:
            workspace = engine.get_workspace()
            fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True, sticky=False)
            Metrics().handle_event(EventType.SYSTEM_START, fl_ctx)  # raises nothing
    assert "there are no metrics" in caplog.text
