"""Who gets the page over HTTP, and who does not."""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pretended_runs import healthy

from fedfms.errors import ConfigError
from fedfms.watch.page import Pages
from fedfms.watch.serve import PageServer


@contextmanager
def served(host: str = "127.0.0.1") -> Iterator[PageServer]:
    server = PageServer(Pages(healthy), host, 0)
    with server.in_background():
        yield server


def ask(
    server: PageServer, path: str, host: str | None = None, method: str = "GET"
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    named = host if host is not None else f"127.0.0.1:{server.port}"
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", named)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def test_the_page_comes_with_a_policy_that_lets_in_its_own_script_alone() -> None:
    with served() as server:
        status, text, headers = ask(server, "/")
        assert server.url == f"http://127.0.0.1:{server.port}/"
    assert status == 200 and "Round 6 of 12 runs" in text
    policy = headers["Content-Security-Policy"]
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers
    assert "Python" not in headers["Server"]


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_it_can_only_be_read(method: str) -> None:
    with served() as server:
        status, text, headers = ask(server, "/", method=method)
    assert status == 405 and headers["Allow"] == "GET"
    assert "Round 6" not in text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8090", 200),  # as through a tunnel, by another port
        ("LOCALHOST", 200),
        ("[::1]:8090", 200),
        ("127.0.0.2", 200),
        ("evil.example", 421),  # a name that somebody lets lead here
        ("evil.example:8090", 421),
        ("127.0.0.1.evil.example", 421),
        ("192.0.2.7:8090", 421),
        ("", 421),
    ],
)
def test_a_page_on_loopback_answers_to_loopback_alone(host: str, status: int) -> None:
    with served() as server:
        found, text, _ = ask(server, "/now", host)
    assert found == status
    assert ("site-1" in text) == (status == 200)


def test_other_paths_are_not_there() -> None:
    with served() as server:
        for path in ("/x", "/now/", "/../etc/passwd", "/run/", "/%2e%2e/", "*"):
            assert ask(server, path)[0] == 404, path
        assert ask(server, "/?anything=1")[0] == 200


def test_bound_elsewhere_it_takes_an_address_that_nobody_can_guess() -> None:
    with served("0.0.0.0") as server, served("0.0.0.0") as other:
        assert len(server.token) >= 32 and server.token != other.token
        assert server.url == f"http://127.0.0.1:{server.port}/{server.token}/"
        other_end = "y" if server.token.endswith("x") else "x"
        for path in (
            "/",
            "/now",
            f"/{other.token}/",
            f"/{server.token[:-1]}{other_end}/",
            f"/{server.token}",
        ):
            status, text, _ = ask(server, path)
            assert status == 404 and "site-1" not in text, path
        assert ask(server, f"/{server.token}/now")[0] == 200
        # an address of any of its networks, its own name, and no other
        assert ask(server, f"/{server.token}/", "192.0.2.7:8090")[0] == 200
        assert ask(server, f"/{server.token}/", socket.gethostname())[0] == 200
        assert ask(server, f"/{server.token}/", "evil.example")[0] == 421


def test_on_loopback_no_other_address_of_this_machine_leads_to_it() -> None:
    with served() as server, socket.socket() as probe:
        probe.settimeout(2)
        with pytest.raises(OSError):
            probe.connect(("127.0.0.2", server.port))


def test_an_address_that_is_taken_is_one_sentence() -> None:
    with served() as server, pytest.raises(ConfigError, match="cannot be served") as caught:
        PageServer(Pages(healthy), "127.0.0.1", server.port)
    assert caught.value.code == "page-address"
    with pytest.raises(ConfigError, match="cannot be served"):
        PageServer(Pages(healthy), "198.51.100.1", 0)  # of another machine


def test_a_browser_that_says_nothing_or_nonsense_does_no_harm() -> None:
    with served() as server:
        silent = socket.create_connection(("127.0.0.1", server.port))
        with socket.create_connection(("127.0.0.1", server.port)) as rude:
            rude.sendall(b"\x16\x03\x01 what\r\n\r\n")
            said = rude.recv(1000)
        assert b"what" not in said and b"site-1" not in said
        assert ask(server, "/")[0] == 200
        silent.close()


def test_an_error_in_the_page_is_not_shown() -> None:
    def broken(path: str) -> None:
        raise RuntimeError("secret words")

    server = PageServer(broken, "127.0.0.1", 0)
    with server.in_background():
        status, text, _ = ask(server, "/")
    assert status == 500 and "secret" not in text
