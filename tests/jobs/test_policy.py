"""What a kit allows and what a site refuses, whoever asks."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from federations import JOBS, of_kind, read_records, write_sites
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.fuel.sec.authz import AuthzContext, Person, parse_policy_config
from nvflare.security.security import COMMAND_CATEGORIES

from fedfms.errors import FederationError
from fedfms.flare.follow import follow, news_from
from fedfms.flare.kit import AUTHORIZATION, CLASSES
from fedfms.flare.progress import Event
from fedfms.flare.session import prepare_job
from fedfms.flare.simulate import Federation, provision
from fedfms.local.sites import find_sites


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provision(tmp_path_factory.mktemp("policy") / "kits", ["site-1", "site-2"], 8002)


def test_keys_are_for_their_owner_only(kits: Path) -> None:
    assert stat.S_IMODE(kits.parents[1].stat().st_mode) == 0o700
    keys = list(kits.rglob("*.key"))
    assert len(keys) == 4  # server, admin, two sites
    assert all(stat.S_IMODE(key.stat().st_mode) & 0o077 == 0 for key in keys)


@pytest.mark.parametrize("participant", ["localhost", "site-1"])
def test_jobs_may_name_flares_classes_and_exactly_ours(kits: Path, participant: str) -> None:
    resources = json.loads((kits / participant / "local" / "resources.json").read_text())
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["class_allow_list"] == [*DEFAULT_CLASS_ALLOW_LIST, *CLASSES]


def test_a_site_streams_no_log_and_the_server_receives_none(kits: Path) -> None:
    site = json.loads((kits / "site-1" / "local" / "resources.json").read_text())
    server = json.loads((kits / "localhost" / "local" / "resources.json").read_text())
    assert site["allow_log_streaming"] is False
    names = {component["id"] for component in [*site["components"], *server["components"]]}
    assert not names & {"site_log_streamer", "log_receiver"}


def test_the_server_keeps_jobs_where_it_is_told_and_uses_mutual_tls(kits: Path) -> None:
    resources = (kits / "localhost" / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in resources
    startup = json.loads((kits / "localhost" / "startup" / "fed_server.json").read_text())
    server = startup["servers"][0]
    assert (server["service"]["scheme"], server["connection_security"]) == ("grpc", "mtls")
    assert server["service"]["target"] == "localhost:8002"  # FLARE listens on loopback only


@pytest.mark.parametrize(
    ("role", "right", "own", "foreign"),
    [
        ("project_admin", "submit_job", True, True),
        ("project_admin", "byoc", False, False),
        ("project_admin", "cat", True, False),  # FLARE's shell commands read files of a site
        ("lead", "submit_job", True, True),
        ("lead", "byoc", False, False),
        ("lead", "cat", True, False),
        ("lead", "shutdown", True, False),
        ("org_admin", "submit_job", False, False),
        ("org_admin", "byoc", False, False),
        ("member", "submit_job", False, False),
        ("member", "check_status", True, True),
    ],
)
def test_who_may_do_what_at_a_site(role: str, right: str, own: bool, foreign: bool) -> None:
    policy, error = parse_policy_config(AUTHORIZATION, COMMAND_CATEGORIES)
    assert not error
    for organization, expected in (("hospital", own), ("elsewhere", foreign)):
        user = Person("somebody", organization, role)
        permitted, _ = policy.evaluate("hospital", AuthzContext(right, user, user))
        assert permitted is expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_code_and_foreign_classes_are_refused_and_a_job_can_be_aborted(tmp_path: Path) -> None:
    sites = write_sites(tmp_path / "sites", ("site-1", "site-2"))
    with_code = prepare_job(JOBS / "fedmsa", tmp_path / "with-code", ["rounds=1"])
    (with_code.folder / "app" / "custom").mkdir()
    (with_code.folder / "app" / "custom" / "code.py").write_text("print('here')\n")
    foreign = prepare_job(JOBS / "fedmsa", tmp_path / "foreign", ["rounds=1"])
    path = foreign.folder / "app/config/config_fed_client.json"
    client = json.loads(path.read_text())
    client["components"].append({"id": "loads-pickles", "path": "torch.load", "args": {"f": "x"}})
    path.write_text(json.dumps(client))
    job = prepare_job(JOBS / "fedmsa", tmp_path / "job", ["rounds=1", "local_epochs=500"])

    federation = Federation(tmp_path / "run", find_sites(sites, None), job.recipe, None, print)
    with federation.running() as coordinator:
        with pytest.raises(FederationError, match="BYOC not permitted"):
            job_id = federation.submit(coordinator, with_code.folder)
            federation.wait_for_end(coordinator, job_id)

        job_id = federation.submit(coordinator, foreign.folder)
        assert federation.wait_for_end(coordinator, job_id) != "FINISHED:COMPLETED"
        log = (federation.logs / "site-1.flare.log").read_text()
        assert "'torch.load' at config path 'components.#1' is not in allow_list" in log

        job_id = federation.submit(coordinator, job.folder)
        began: list[Event] = []

        def abort_at_the_first_round(event: Event) -> None:
            if event.round == 0 and not began:
                began.append(event)
                coordinator.stop(job_id)

        news = news_from(coordinator, job_id)
        ended = follow(coordinator, job_id, news=news, tell=abort_at_the_first_round)
        assert ended.status == "FINISHED:ABORTED"
        records = read_records(coordinator.download(job_id, tmp_path / "download"))
    assert of_kind(records, "job_done")[0]["status"] == "aborted"
