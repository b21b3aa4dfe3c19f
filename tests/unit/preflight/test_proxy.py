"""Where only an HTTP proxy leads out: the checks, FLARE and the health probe all go through it."""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from little_proxy import AROUND, LittleProxy, little_proxy
from site_kits import FEDFMS, change_about, check_flare_side, copy_places

from fedfms.errors import FedfmsError
from fedfms.flare.simulate import free_port
from fedfms.flare.start import why_not_registered
from fedfms.preflight.health import check_flare
from fedfms.preflight.items import Item
from fedfms.preflight.kit import check_kit
from fedfms.preflight.network import NetworkError, proxy_for

# environment without {url} of the proxy; whether gRPC goes through it
NAMED = [
    ({"https_proxy": "{url}"}, True),
    ({"http_proxy": "{url}"}, True),
    ({"grpc_proxy": "{url}", "https_proxy": "http://127.0.0.1:9"}, True),
    ({"https_proxy": "", "http_proxy": "{url}"}, False),
    ({"HTTPS_PROXY": "{url}"}, False),
    ({"https_proxy": "{url}", "no_grpc_proxy": "", "no_proxy": "fl.example.invalid"}, True),
]


@pytest.fixture
def proxy() -> Iterator[LittleProxy]:
    with little_proxy() as one:
        yield one


@pytest.fixture
def through(proxy: LittleProxy, monkeypatch: pytest.MonkeyPatch) -> LittleProxy:
    """A proxy that the environment names."""
    monkeypatch.setenv("https_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "")  # as compose sets it where .env does not
    return proxy


def statuses(items: list[Item]) -> dict[str, str]:
    return {item.code: item.status for item in items}


def fails(items: list[Item], code: str, fix: str) -> Item:
    [failed] = [item for item in items if item.status == "FAIL"]
    assert failed.code == code
    assert re.search(fix, failed.fix), failed.fix
    return failed


# ------------------------------------------------------------- the rules, against gRPC itself


def grpc_asks(proxy: LittleProxy, target: str, environment: dict[str, str]) -> bool:
    """Whether gRPC asks the proxy for a target."""
    proxy.asked.clear()
    script = (
        "import grpc, sys\n"
        "channel = grpc.insecure_channel(sys.argv[1])\n"
        "try: grpc.channel_ready_future(channel).result(timeout=0.5)\n"
        "except grpc.FutureTimeoutError: pass\n"
    )
    clean = {name: v for name, v in os.environ.items() if "proxy" not in name.lower()}
    subprocess.run(
        [sys.executable, "-c", script, target], env={**clean, **environment}, check=True, timeout=60
    )
    return target in proxy.asked


@pytest.mark.parametrize(("host", "no_proxy", "around"), AROUND)
def test_the_way_around_a_proxy_is_grpcs(proxy, host, no_proxy, around):
    environment = {"https_proxy": proxy.url, "no_proxy": no_proxy}
    assert grpc_asks(proxy, f"{host}:{free_port()}", environment) is not around
    assert (proxy_for(host, environment) is None) is around


@pytest.mark.parametrize(("environment", "used"), NAMED)
def test_the_choice_of_a_proxy_is_grpcs(proxy, environment, used):
    values = {name: value.format(url=proxy.url) for name, value in environment.items()}
    host = "fl.example.invalid"
    assert grpc_asks(proxy, f"{host}:{free_port()}", values) is used
    found = proxy_for(host, values)
    assert (found is not None and found.port == proxy.server_port) is used


@pytest.mark.parametrize("value", ["127.0.0.1:{port}", "localhost:{port}", "https://[::1]:{port}"])
def test_what_grpc_does_not_understand_is_said(proxy, value):
    environment = {"https_proxy": value.format(port=proxy.server_port)}
    assert not grpc_asks(proxy, f"localhost:{free_port()}", environment)
    with pytest.raises(NetworkError, match="does not understand") as caught:
        proxy_for("localhost", environment)
    assert "http://HOST:PORT" in caught.value.fix


# ------------------------------------------------------------------------------------ check-site


def test_a_site_behind_a_proxy_passes_every_line(server, places, through, made, tmp_path):
    items = check_flare_side(copy_places(made, "line-1", tmp_path / "line-1"))
    found = statuses(items)
    assert set(found.values()) <= {"PASS", "WARN"}, found
    assert {code for code, status in found.items() if status == "WARN"} <= {
        *("exchange-size", "trainer")
    }
    # the item, TCP, TLS, and FLARE's own cell, for its greeting and to measure
    assert through.asked == [f"localhost:{made.port}"] * 5
    assert "MB/s down" in next(item.text for item in items if item.code == "line")


def test_a_proxy_with_a_password(server, places, proxy, monkeypatch):
    proxy.login = "Basic " + base64.b64encode(b"site:p@ss:word").decode()
    monkeypatch.setenv("https_proxy", proxy.url)
    item = fails(check_flare_side(places), "proxy", "USER:PASSWORD@HOST:PORT")
    assert "407" in item.text
    monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//site:p%40ss%3Aword@"))
    items = check_flare_side(places)
    assert "FAIL" not in statuses(items).values()
    shown = " ".join(item.text for item in items)
    assert "p@ss" not in shown and "p%40ss" not in shown


def test_a_proxy_that_refuses(server, places, through):
    through.refusal = 403
    items = check_flare_side(places)
    item = fails(items, "proxy", "ask your network's administrators to let CONNECT to localhost:")
    assert "403 Forbidden" in item.text
    skipped = {code for code, status in statuses(items).items() if status == "SKIP"}
    assert skipped == {"server-tcp", "server-tls", "server-flare", "clock", "version", "revoked"}


def test_a_proxy_that_is_not_there(server, places, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    item = fails(check_flare_side(places), "proxy", "SITE_PROXY")
    assert "cannot be reached" in item.text
    monkeypatch.setenv("https_proxy", "http://proxy.hospital.invalid:3128")
    fails(check_flare_side(places), "proxy", "SITE_PROXY")
    monkeypatch.setenv("https_proxy", "proxy.hospital.invalid:3128")
    fails(check_flare_side(places), "proxy", "http://HOST:PORT")
    monkeypatch.setenv("no_proxy", "intranet,localhost")
    assert "FAIL" not in statuses(check_flare_side(places)).values()


def test_a_proxy_that_is_none(server, places, monkeypatch, made):
    with socket.create_server(("127.0.0.1", 0)) as main:
        main.listen()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{main.getsockname()[1]}")
        process = subprocess.Popen(
            [sys.executable, "-c", ANSWERS_AS_SSH], pass_fds=[main.fileno()], stdin=main.fileno()
        )
        try:
            item = fails(check_flare_side(places), "proxy", "SITE_PROXY")
        finally:
            process.kill()
            process.wait()
    assert "no HTTP proxy" in item.text


# standard input is a socket that listens
ANSWERS_AS_SSH = (
    "import socket\n"
    "main = socket.socket(fileno=0)\n"
    "stream, _ = main.accept()\n"
    "stream.sendall(b'SSH-2.0-none\\r\\n\\r\\n')\n"
    "stream.recv(4096)\n"
)


def test_a_server_that_the_proxy_does_not_reach(places, made, through):
    change_about(made, places.kit, server_port=free_port())
    items = check_flare_side(places)
    fails(items, "server-tcp", "whether the server runs")
    assert statuses(items)["proxy"] == "PASS"


def test_silence_behind_a_proxy_is_explained(server, places, through):
    kit = check_kit(places.kit, "client")
    assert "in order" in why_not_registered(kit)
    through.refusal = 403
    assert "refuses to connect to localhost" in why_not_registered(kit)


# ---------------------------------------------------------------------------------- the real site


def test_a_flare_client_joins_through_the_proxy_and_is_healthy(server, places, through, made):
    process = subprocess.Popen(
        [
            *(*FEDFMS, "flare", "--kit", str(places.kit), "--policy", str(places.policy)),
            *("--workspace", str(places.workspace)),
        ],
        env={**os.environ, "SITE_NAME": "site-1"},
        stdout=(places.workspace.parent / "flare.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                said = check_flare(places.kit, places.workspace)
                break
            except FedfmsError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert said == f"the FLARE client is connected to localhost through the proxy {through.url}"
        log = places.workspace.parent / "flare.log"
        while "Successfully registered client:site-1" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        assert set(through.asked) == {f"localhost:{made.port}"}
    finally:
        process.terminate()
        process.wait(20)
