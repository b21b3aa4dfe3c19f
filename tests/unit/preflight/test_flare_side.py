"""`fedfms check-site` in the container with the network: whatever is broken, that line fails, and
what stands on it is skipped."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from site_kits import (
    FEDFMS,
    change_about,
    change_certificate,
    check_flare_side,
    copy_places,
    in_namespace,
)

from fedfms.contracts.announcement import Announcement
from fedfms.contracts.messages import SOCKET_NAME, encode
from fedfms.flare.simulate import SERVER, free_port
from fedfms.kits.kit import read_kit
from fedfms.preflight.items import Item
from fedfms.preflight.site import FlarePlaces

SERVER_ITEMS = [
    *("server-name", "proxy", "server-tcp", "server-tls", "server-flare"),
    *("clock", "version", "revoked"),
]
AFTER_TLS = {"server-flare", "clock", "version", "revoked"}


def codes(items: list[Item], status: str) -> set[str]:
    return {item.code for item in items if item.status == status}


def fails(items: list[Item], code: str, fix: str) -> Item:
    """Exactly one line fails, this one, and says what to do."""
    failed = [item for item in items if item.status == "FAIL"]
    assert [item.code for item in failed] == [code], failed
    assert re.search(fix, failed[0].fix), failed[0].fix
    return failed[0]


def test_a_site_in_order_passes_every_line(server, places):
    items = check_flare_side(places)
    assert codes(items, "FAIL") == codes(items, "SKIP") == set()
    # pytest's folders are on a disk, and no trainer runs
    assert codes(items, "WARN") <= {"exchange-size", "trainer"}
    assert [item.code for item in items if item.code in SERVER_ITEMS] == SERVER_ITEMS


# ---------------------------------------------------------------------------------------- the kit


def test_a_changed_kit(server, places):
    with (places.kit / "local" / "resources.json").open("a") as file:
        file.write("\n")
    item = fails(check_flare_side(places), "kit", "unzip the kit again")
    assert item.reason == "kit-changed"
    assert "resources.json" in item.text


def test_an_incomplete_kit(server, places):
    (places.kit / "local" / "privacy.json.sample").unlink()
    item = fails(check_flare_side(places), "kit", "unzip the kit again")
    assert item.reason == "kit-incomplete"


def test_a_kit_with_checksums_of_nobody(server, places, made, foreign):
    replace(made, ca_key=foreign.ca_key).sign(places.kit)
    item = fails(check_flare_side(places), "kit", "unzip the kit again")
    assert item.reason == "kit-unsigned"


def test_no_kit_at_all(places):
    shutil.rmtree(places.kit)
    items = check_flare_side(places)
    fails(items, "kit", "kit/ of an unzipped kit")
    assert codes(items, "SKIP") == {
        *SERVER_ITEMS,
        *("certificate-dates", "certificate-name", "certificate-ca", "authorization"),
    }


def test_the_kit_of_the_server(server, places, made):
    shutil.rmtree(places.kit)
    shutil.copytree(made.kit(SERVER), places.kit)
    items = check_flare_side(places)
    assert next(item for item in items if item.code == "kit").reason == "kit-wrong-role"


@pytest.mark.parametrize(
    ("days", "reason", "fix"),
    [
        ((-100, -1), "kit-expired", "ask the coordinator to renew"),
        ((1, 100), "kit-not-yet-valid", "clock"),
    ],
)
def test_certificate_dates(server, places, made, days, reason, fix):
    change_certificate(made, places.kit, days=days)
    items = check_flare_side(places)
    assert fails(items, "certificate-dates", fix).reason == reason
    assert codes(items, "SKIP") == {"server-tls", *AFTER_TLS}


def test_a_certificate_that_ends_soon_is_worth_a_word(server, places, made):
    change_certificate(made, places.kit, days=(-1, 20))
    items = check_flare_side(places)
    assert codes(items, "FAIL") == set()
    assert "certificate-dates" in codes(items, "WARN")


def test_the_days_of_a_kit_are_those_of_the_certificate_that_ends_first(places, made):
    change_certificate(made, places.kit, days=(-1, 200))
    long = read_kit(places.kit)
    change_certificate(made, places.kit, days=(-1, 20))
    soon = read_kit(places.kit)
    assert (long.days_left, soon.days_left) == (199, 19)
    assert replace(long, root=soon.certificate).days_left == 19  # the authority's too


def test_the_certificate_of_another_site(server, places, made):
    for name in ("client.crt", "client.key"):
        shutil.copy(made.kit("site-2") / "startup" / name, places.kit / "startup")
    made.sign(places.kit)
    items = check_flare_side(places)
    item = fails(items, "certificate-name", "as the coordinator sent it")
    assert "site-2" in item.text and "site-1" in item.text
    assert codes(items, "SKIP") == AFTER_TLS


def test_another_site_name(server, places, monkeypatch):
    monkeypatch.setenv("SITE_NAME", "site-2")
    item = fails(check_flare_side(places), "certificate-name", "SITE_NAME=site-1")
    assert item.reason == "site-name"


def test_a_certificate_of_another_ca(server, places, made, foreign):
    change_certificate(made, places.kit, ca_key=foreign.ca_key)
    items = check_flare_side(places)
    fails(items, "certificate-ca", "ask the coordinator")
    assert codes(items, "SKIP") == {"server-tls", *AFTER_TLS}


# ------------------------------------------------------------------------------------- the server


def test_a_host_without_a_name(places, made):
    change_about(made, places.kit, server_host="fedfms-no-such-host.invalid")
    items = check_flare_side(places)
    fails(items, "server-name", "SERVER_EXTRA_HOST=fedfms-no-such-host.invalid")
    assert codes(items, "SKIP") == {"server-tcp", "server-tls", *AFTER_TLS}
    [tcp] = [item for item in items if item.code == "server-tcp"]
    assert tcp.text == "not looked at before server-name passed"


def test_a_closed_port(places, made):
    change_about(made, places.kit, server_port=free_port())
    items = check_flare_side(places)
    fails(items, "server-tcp", "ask the coordinator whether the server runs")
    assert codes(items, "SKIP") == {"server-tls", *AFTER_TLS}


def test_a_kit_of_another_project(server, places, foreign):
    """All of it is in order, but the server belongs to another CA."""
    shutil.rmtree(places.kit)
    shutil.copytree(foreign.kit("site-1"), places.kit)
    items = check_flare_side(places)
    fails(items, "server-tls", "the kit is of another project")
    assert codes(items, "SKIP") == AFTER_TLS


@pytest.fixture
def listener() -> Iterator[Callable[[ssl.SSLContext | None], int]]:
    """Starts a listener on loopback that accepts, does TLS if told, and says nothing; its port."""
    sockets: list[socket.socket] = []

    def start(context: ssl.SSLContext | None) -> int:
        main = socket.create_server(("127.0.0.1", 0))
        sockets.append(main)

        def serve() -> None:
            while True:
                try:
                    stream, _ = main.accept()
                except OSError:
                    return
                try:
                    if context is None:
                        stream.sendall(b"SSH-2.0-none\r\n")
                    else:
                        stream = context.wrap_socket(stream, server_side=True)
                        stream.sendall(b"\0" * 9)
                except OSError:
                    pass
                sockets.append(stream)

        threading.Thread(target=serve, daemon=True).start()
        return main.getsockname()[1]

    yield start
    for one in sockets:
        one.close()


def test_a_port_without_tls(places, made, listener):
    change_about(made, places.kit, server_port=listener(None))
    fails(check_flare_side(places), "server-tls", "firewall or proxy")


def test_a_server_certificate_of_another_ca(places, made, foreign, listener):
    """As behind a firewall that opens TLS connections."""
    startup = foreign.kit(SERVER) / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(startup / "server.crt", startup / "server.key")
    change_about(made, places.kit, server_port=listener(context))
    fails(check_flare_side(places), "server-tls", "open TLS connections")


def test_a_server_certificate_of_another_name(server, places, made):
    change_about(made, places.kit, server_host="127.0.0.1")  # its certificate says localhost
    assert "127.0.0.1" in fails(check_flare_side(places), "server-tls", "ask the coordinator").text


def test_a_server_that_refuses_this_certificate(places, made, foreign, listener):
    """The kit is in order, the server does not know its CA."""
    startup = made.kit(SERVER) / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(startup / "server.crt", startup / "server.key")
    context.load_verify_locations(foreign.kit(SERVER) / "startup" / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    change_about(made, places.kit, server_port=listener(context))
    item = fails(check_flare_side(places), "server-tls", "ask the coordinator for a new kit")
    assert item.reason == "tls-refused"


def test_a_server_that_does_not_speak_flare(places, made, listener):
    startup = made.kit(SERVER) / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(startup / "server.crt", startup / "server.key")
    port = listener(context)
    config = places.kit / "startup" / "fed_client.json"
    config.write_text(config.read_text().replace(f"localhost:{made.port}", f"localhost:{port}"))
    change_about(made, places.kit, server_port=port)
    items = check_flare_side(places)
    fails(items, "server-flare", "ask the coordinator whether the server has started")
    assert codes(items, "SKIP") == {"clock", "version", "revoked"}


@pytest.mark.parametrize(
    ("site", "code", "fix"),
    [
        ("other-clock", "clock", "chrony"),
        ("other-version", "version", "image of version 9.9.9"),
        ("disabled", "revoked", "ask the coordinator"),
    ],
)
def test_what_the_server_says(server, places, made, tmp_path, site, code, fix):
    fails(check_flare_side(copy_places(made, site, tmp_path / site)), code, fix)


def test_a_server_without_greetings_fails_nothing(server, places, made, tmp_path):
    items = check_flare_side(copy_places(made, "no-greeting", tmp_path / "site"))
    assert codes(items, "FAIL") == set()
    assert codes(items, "WARN") >= {"clock", "version", "revoked"}


# ---------------------------------------------------------------------------- policy and machine


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p.pop("permissions"), "policy-invalid"),
        (lambda p: p["permissions"].update(project_admin="any"), "policy-lets-code-in"),
        (lambda p: p["permissions"]["lead"].update(byoc="any"), "policy-lets-code-in"),
        (lambda p: p["permissions"]["lead"].update(BYOC=["not n:bob"]), "policy-lets-code-in"),
        (lambda p: p["permissions"]["lead"].update(shell_commands="any"), "policy-lets-shell-in"),
        (lambda p: p["permissions"]["lead"].update(cat="o:elsewhere"), "policy-lets-shell-in"),
        (lambda p: p["permissions"]["lead"].update(ls=["o:site", "any"]), "policy-lets-shell-in"),
    ],
)
def test_a_policy_that_is_open(server, places, change, reason):
    path = places.policy / "authorization.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    assert fails(check_flare_side(places), "authorization", "").reason == reason


def test_a_policy_for_the_sites_own_people_is_closed(server, places):
    path = places.policy / "authorization.json"
    values = json.loads(path.read_text())
    values["permissions"]["lead"].update(shell_commands=["o: Site_1", "none"], cat="O:site")
    path.write_text(json.dumps(values))
    assert codes(check_flare_side(places), "FAIL") == set()


def test_no_policy(server, places):
    (places.policy / "authorization.json").unlink()
    fails(check_flare_side(places), "authorization", "policy/ back")


def test_a_workspace_that_cannot_be_written(server, places):
    items = check_flare_side(replace(places, workspace=places.workspace / "none"))
    fails(items, "workspace", "FEDFMS_UID")
    assert codes(items, "SKIP") == {"workspace-disk"}


def test_no_exchange(server, places):
    items = check_flare_side(replace(places, exchange=places.exchange / "none"))
    fails(items, "exchange", "mount a volume there")
    assert codes(items, "SKIP") == {"exchange-size", "trainer"}


@pytest.mark.parametrize(
    ("folder", "code", "fix"),
    [("workspace", "workspace-disk", "free room"), ("exchange", "exchange-size", "EXCHANGE_SIZE")],
)
def test_a_small_volume(server, places, namespace, folder, code, fix):
    items = namespace([f"mount -t tmpfs -o size=10m none {getattr(places, folder)}"], places)
    fails(items, code, fix)


def test_a_trainer_of_another_version(server, places):
    with socket.socket(socket.AF_UNIX) as main:
        main.bind(str(places.exchange / SOCKET_NAME))
        main.listen()
        main.settimeout(20)

        def answer() -> None:
            stream, _ = main.accept()
            with stream:
                stream.recv(1024)
                stream.sendall(encode(Announcement("site-1", "0.0.9", False)))

        thread = threading.Thread(target=answer)
        thread.start()
        items = check_flare_side(places)
        thread.join()
    fails(items, "trainer", "one FEDFMS_IMAGE")


@pytest.fixture
def namespace() -> Callable[[list[str], FlarePlaces], list[Item]]:
    """Runs the command in a mount namespace of its own, after some mounts."""

    def run(commands: list[str], places: FlarePlaces) -> list[Item]:
        arguments = [
            *("check-site", "--role", "flare", "--json"),
            *("--kit", str(places.kit), "--policy", str(places.policy)),
            *("--workspace", str(places.workspace), "--exchange", str(places.exchange)),
        ]
        return in_namespace("-rm", commands, arguments)

    return run


def test_a_person_reads_one_line_an_item(places, made):
    change_about(made, places.kit, server_port=free_port())
    done = subprocess.run(
        [
            *(*FEDFMS, "check-site", "--kit", str(places.kit), "--policy", str(places.policy)),
            *("--workspace", str(places.workspace), "--exchange", str(places.exchange)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert re.search(r"^FAIL server-tcp: nothing answers at localhost:\d+", done.stdout, re.M)
    assert re.search(r"^ +fix: ask the coordinator whether the server runs", done.stdout, re.M)
    assert "Traceback" not in done.stdout + done.stderr


def test_nothing_is_changed(server, places):
    def state(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    before = state(places.kit.parent)
    check_flare_side(places)
    assert state(places.kit.parent) == before
