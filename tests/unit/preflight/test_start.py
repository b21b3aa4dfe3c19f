"""What the roles refuse before FLARE starts, and how they lay a kit out for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from site_kits import FEDFMS, Made, change_about, change_certificate, copy_places

from fedfms.errors import ConfigError, FedfmsError
from fedfms.flare.simulate import SERVER, free_port
from fedfms.flare.start import lay_out, refuse_requests, run_client, run_server, why_not_registered
from fedfms.preflight.health import (
    check_flare,
    check_server,
    check_trainer,
    role_of_container,
)
from fedfms.preflight.kit import check_kit
from fedfms.preflight.site import FlarePlaces


def start(places: FlarePlaces) -> None:
    run_client(places.kit, places.policy, places.workspace)


def expired(places, made, foreign):
    change_certificate(made, places.kit, days=(-10, -1))


def not_yet_valid(places, made, foreign):
    change_certificate(made, places.kit, days=(1, 10))


def of_another_site(places, made, foreign):
    for name in ("client.crt", "client.key"):
        shutil.copy(made.kit("site-2") / "startup" / name, places.kit / "startup")
    made.sign(places.kit)


def of_another_ca(places, made, foreign):
    change_certificate(made, places.kit, ca_key=foreign.ca_key)


def changed(places, made, foreign):
    path = places.kit / "startup" / "fed_client.json"
    path.write_text(path.read_text().replace("localhost", "elsewhere"))


def incomplete(places, made, foreign):
    (places.kit / "startup" / "client.crt").unlink()


def of_the_server(places, made, foreign):
    shutil.rmtree(places.kit)
    shutil.copytree(made.kit(SERVER), places.kit)


def without_policy(places, made, foreign):
    (places.policy / "authorization.json").unlink()


def with_the_policy_of_flare(places, made, foreign):
    default = places.kit / "local" / "authorization.json.default"
    shutil.copy(default, places.policy / "authorization.json")


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (expired, "kit-expired"),
        (not_yet_valid, "kit-not-yet-valid"),
        (of_another_site, "kit-other-name"),
        (of_another_ca, "kit-other-ca"),
        (changed, "kit-changed"),
        (incomplete, "kit-incomplete"),
        (of_the_server, "kit-wrong-role"),
        (without_policy, "policy-invalid"),
        (with_the_policy_of_flare, "policy-lets-code-in"),
    ],
)
def test_a_site_does_not_start(places, made, foreign, break_it, code):
    break_it(places, made, foreign)
    with pytest.raises(ConfigError) as caught:
        start(places)
    assert caught.value.code == code
    assert caught.value.fix
    assert list(places.workspace.iterdir()) == []


def test_a_site_does_not_start_under_another_name(places, monkeypatch):
    monkeypatch.setenv("SITE_NAME", "site-2")
    with pytest.raises(ConfigError, match="SITE_NAME is site-2, but the kit"):
        start(places)


def test_a_server_does_not_start_from_a_sites_kit(places):
    with pytest.raises(ConfigError, match="site") as caught:
        run_server(places.kit, places.workspace)
    assert "fedfms flare" in caught.value.fix


def test_the_command_says_why_and_ends(places, made):
    change_certificate(made, places.kit, days=(-10, -1))
    done = subprocess.run(
        [
            *(*FEDFMS, "flare", "--kit", str(places.kit), "--policy", str(places.policy)),
            *("--workspace", str(places.workspace)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "expired on" in done.stderr and "ask the coordinator to renew" in done.stderr


def test_a_kit_is_laid_out_anew_at_every_start(places, made):
    for path in [*places.kit.rglob("*"), places.kit]:  # as mounted read-only
        path.chmod(0o555 if path.is_dir() else 0o444)
    kit = check_kit(places.kit, "client")
    before = os.umask(0o022)
    try:
        lay_out(kit, places.workspace, b'{"the": "site\'s own"}')
        # what FLARE, an intruder or an older start may have left
        (places.workspace / "daemon_pid.fl").write_text("1")
        (places.workspace / "local" / "custom").mkdir()
        (places.workspace / "local" / "custom" / "code.py").write_text("")
        (places.workspace / "startup" / "fed_client.json").write_text("{}")
        (places.workspace / "job").mkdir()
        lay_out(kit, places.workspace, b'{"the": "site\'s own"}')
    finally:
        os.umask(before)
    assert {path.name for path in places.workspace.iterdir()} == {
        *("startup", "local", "job", "fedfms.pid")
    }
    local = places.workspace / "local"
    assert json.loads((local / "authorization.json").read_text()) == {"the": "site's own"}
    assert not (local / "custom").exists()
    for path in sorted((places.kit / "startup").iterdir()):
        assert (places.workspace / "startup" / path.name).read_bytes() == path.read_bytes()
    key = places.workspace / "startup" / "client.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.parent.stat().st_mode & 0o007 == 0


def test_a_workspace_that_cannot_be_written(places):
    (places.workspace / "startup").write_text("a file")
    with pytest.raises(ConfigError) as caught:
        lay_out(check_kit(places.kit, "client"), places.workspace / "startup" / "below")
    assert caught.value.code == "workspace"


def test_no_processor_of_flare_is_left_for_what_is_refused():
    from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
    from nvflare.private.fed.client.shell_cmd import ShellCommandProcessor

    before = list(ClientRequestProcessors.request_processors)
    try:
        refuse_requests()
        after = ClientRequestProcessors.request_processors
        assert not any(isinstance(one, ShellCommandProcessor) for one in after)
        topics = [topic for one in after for topic in one.get_topics()]
        assert sorted(topics) == sorted(t for one in before for t in one.get_topics())
    finally:
        ClientRequestProcessors.request_processors[:] = before


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"server_host": "fedfms-no-such-host.invalid"}, "has no address here.*; fix: ask"),
        ({"server_port": 9}, "nothing answers at localhost:9 .*; fix: "),
    ],
)
def test_silence_is_explained_in_one_line(places, made, change, cause):
    change_about(made, places.kit, **change)
    said = why_not_registered(check_kit(places.kit, "client"))
    assert "\n" not in said
    assert re.search(cause, said), said


def test_silence_of_a_server_that_has_another_ca(server, places, foreign):
    shutil.rmtree(places.kit)
    shutil.copytree(foreign.kit("site-1"), places.kit)
    assert "does not trust" in why_not_registered(check_kit(places.kit, "client"))


def test_silence_of_a_server_that_answers(server, places, monkeypatch):
    kit = check_kit(places.kit, "client")
    assert "disabled this site" in why_not_registered(kit)
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:1")
    assert "the proxy http://proxy.invalid:1 cannot be reached" in why_not_registered(kit)


# ----------------------------------------------------------------------------------------- health


def test_the_health_of_a_server(server, made, foreign, places):
    assert "answers" in check_server(made.kit(SERVER))
    with pytest.raises(FedfmsError, match="does not trust"):
        check_server(foreign.kit(SERVER))
    change_about(made, places.kit, server_port=free_port())
    with pytest.raises(FedfmsError, match="nothing answers"):
        check_server(places.kit)


def test_a_server_is_not_disturbed_by_its_health_probe(server, made):
    before = (server / "out.log").read_text()
    check_server(made.kit(SERVER))
    check_server(made.kit(SERVER))
    assert "PEER_DID_NOT" not in (server / "out.log").read_text()[len(before) :]


def test_the_health_of_a_client_that_is_not_there(places: FlarePlaces, made: Made):
    with pytest.raises(FedfmsError, match="no FLARE client runs"):
        check_flare(places.kit, places.workspace)
    lay_out(check_kit(places.kit, "client"), places.workspace)  # notes this process
    with pytest.raises(FedfmsError, match="has no connection to localhost"):
        check_flare(places.kit, places.workspace)
    note = places.workspace / "fedfms.pid"
    values = json.loads(note.read_text())
    note.write_text(json.dumps({**values, "started": values["started"] - 100}))
    with pytest.raises(FedfmsError, match="no FLARE client runs"):  # another's process id by now
        check_flare(places.kit, places.workspace)


def test_the_health_of_a_trainer_that_is_not_there(tmp_path: Path):
    with pytest.raises(FedfmsError, match="no trainer answers"):
        check_trainer(tmp_path)


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["/sbin/docker-init", "--", "entrypoint", "trainer"], "trainer"),
        (["/sbin/docker-init", "--", "entrypoint", "dry-run"], "dry-run"),
        (["/sbin/docker-init", "--", "entrypoint"], None),
        (["/opt/venv/bin/python", "/opt/venv/bin/fedfms", "train-local", "/job"], "train-local"),
        (["/usr/lib/systemd/systemd", "--user"], None),
    ],
)
def test_a_container_knows_what_it_was_started_for(tmp_path, command, role):
    """One that does one thing and ends is not unhealthy because no role runs in it."""
    (tmp_path / "cmdline").write_bytes("\0".join([*command, ""]).encode())
    assert role_of_container(tmp_path / "cmdline") == role
    assert role_of_container(tmp_path / "none") is None


def test_a_health_probe_imports_neither_torch_nor_flare(places):
    script = (
        "import sys; sys.argv = ['fedfms', 'health', 'flare', '--kit', sys.argv[1]]\n"
        "from fedfms.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'nvflare'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [FEDFMS[0], "-c", script, str(places.kit)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip().endswith("[]")
    assert done.returncode == 1 and "no FLARE client runs" in done.stderr


def test_the_kit_that_is_broken_above_is_in_order(places):
    assert check_kit(places.kit, "client", "site-1").organisation == "site_1"


def test_a_disabled_site_ends_and_says_so(server, made, tmp_path):
    places = copy_places(made, "disabled", tmp_path / "site")
    done = subprocess.run(
        [
            *(*FEDFMS, "flare", "--kit", str(places.kit), "--policy", str(places.policy)),
            *("--workspace", str(places.workspace)),
        ],
        env={**os.environ, "SITE_NAME": "disabled"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode not in (0, 75)  # so that a container's restart policy acts
    said = done.stdout + done.stderr
    assert "Client 'disabled' is disabled" in said
    assert "never registered at the server: name, port and certificates are in order" in said


def test_a_kit_that_the_containers_user_may_not_read(made):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for their owner alone
        kit = Path(folder) / "kit"
        shutil.copytree(made.kit("site-1"), kit)
        kit.chmod(0o755)
        for path in kit.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        Path(folder).chmod(0o755)
        (kit / "startup" / "client.key").chmod(0)
        me = os.geteuid()
        try:
            if me == 0:
                os.seteuid(65534)
            with pytest.raises(ConfigError, match=r"client\.key cannot be read") as caught:
                check_kit(kit, "client")
        finally:
            os.seteuid(me)
    assert "FEDFMS_UID" in caught.value.fix
