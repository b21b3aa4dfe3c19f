"""Serves pages to a browser of this machine, and to nobody who was not meant.

Loopback by default. Whoever binds another address gets an address with a random part, which has to
be known. A request must name this machine as its host, or a page from elsewhere could read this one
through a name of its own that leads here (DNS rebinding). Nothing can be changed: GET alone.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedfms.errors import ConfigError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PORT = 8090
REQUEST_SECONDS = 15.0  # for a browser to say what it wants
BROWSERS = 32  # that are answered at once; others wait

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a path holds."""

    body: str
    policy: str = "default-src 'none'"  # Content-Security-Policy
    kind: str = "text/html"  # of MIME; always UTF-8


Pages = Callable[[str], Answer | None]  # path such as /run/ID/; None: there is none


class PageServer:
    """Serves until it is closed."""

    def __init__(self, pages: Pages, host: str = LOOPBACK, port: int = PORT) -> None:
        """Bind, without answering yet.

        Args:
            pages: asked by several threads at once.
            host: an address of this machine, or a name of it.
            port: 0 for any that is free.

        Raises:
            ConfigError: code page-address; the address cannot be had.
        """
        try:
            family, *_, place = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.is_local = ipaddress.ip_address(place[0]).is_loopback
            self.token = "" if self.is_local else secrets.token_urlsafe(24)
            self._server = _server(family, (str(place[0]), port), self)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"the page cannot be served at {host}, port {port}: "
                f"{getattr(error, 'strerror', None) or error}",
                "take another port: --port 0 for any that is free; --host takes an address of this "
                "machine",
                code="page-address",
            ) from None
        self.pages = pages
        self.port = self._server.server_address[1]
        self.names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
        self.names.add(host.lower())

    @property
    def prefix(self) -> str:
        """What every path begins with."""
        return f"/{self.token}/" if self.token else "/"

    @property
    def url(self) -> str:
        """The address for a browser of this machine."""
        host = str(self._server.server_address[0])
        host = LOOPBACK if host in ("0.0.0.0", "::") else host  # any address
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.prefix}"

    def serve(self) -> None:
        """Answer until `close`, or Ctrl-C."""
        self._server.serve_forever(poll_interval=0.3)

    @contextlib.contextmanager
    def in_background(self) -> Iterator[None]:
        """Answer inside the `with`."""
        thread = threading.Thread(target=self.serve, name="page", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self.close()

    def close(self) -> None:
        """Give the port back."""
        self._server.server_close()

    def is_meant(self, host: str | None) -> bool:
        """Whether a request's Host names this machine: an address, or one of its names.

        An address is none that somebody's name server could have made up.
        """
        if not host:
            return False
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.removeprefix("[").removesuffix("]").lower()
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost" if self.is_local else name in self.names
        return address.is_loopback or not self.is_local

    def find(self, path: str) -> Answer | None:
        """What a path holds, if it begins as it must."""
        begins = path[: len(self.prefix)]
        if not hmac.compare_digest(begins.encode(), self.prefix.encode()):
            return None
        return self.pages("/" + path[len(self.prefix) :])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    page: PageServer

    def __init__(self, *given: Any) -> None:
        self._room = threading.BoundedSemaphore(BROWSERS)
        super().__init__(*given)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._room:
            super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no news."""


def _server(family: int, place: tuple[str, int], page: PageServer) -> _Server:
    class Server(_Server):
        address_family = family
        allow_reuse_address = True

    server = Server(place, _Handler)
    server.page = page
    return server


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS
    server_version, sys_version = "fedfms", ""

    def parse_request(self) -> bool:
        """Read a request; whatever is not GET is refused here."""
        if not super().parse_request():
            return False
        if self.command != "GET":
            self._say(HTTPStatus.METHOD_NOT_ALLOWED, "this page can only be read", Allow="GET")
        return self.command == "GET"

    def do_GET(self) -> None:
        """Answer a browser."""
        if not self.server.page.is_meant(self.headers.get("Host")):
            self._say(
                HTTPStatus.MISDIRECTED_REQUEST, "this page answers under its own address only"
            )
            return
        path = self.path.partition("?")[0]
        try:
            found = self.server.page.find(path)
        except Exception:  # told here, and not to the browser
            log.exception("a page could not be made")
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, "the page could not be made")
            return
        if found is None:
            self._say(HTTPStatus.NOT_FOUND, "there is no such page")
        else:
            self._send(HTTPStatus.OK, found)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses: a line, without what was asked."""
        self._say(HTTPStatus(code), HTTPStatus(code).phrase)

    def _say(self, status: HTTPStatus, text: str, **headers: str) -> None:
        self._send(status, Answer(f"{text}\n", kind="text/plain"), **headers)

    def _send(self, status: HTTPStatus, answer: Answer, **headers: str) -> None:
        body = answer.body.encode()
        self.close_connection = True
        self.send_response(status)
        about = {"Content-Type": f"{answer.kind}; charset=utf-8", "Content-Length": str(len(body))}
        policy = {"Content-Security-Policy": answer.policy}
        for name, value in {**about, **policy, **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: paths hold the random part."""
