"""A real HTTP proxy on loopback, as small as one can be: it does CONNECT and nothing else.

The container tests run the same file: python little_proxy.py PORT.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# host, no_proxy, whether gRPC goes around the proxy
AROUND = [
    ("fl.example.invalid", "", False),
    ("fl.example.invalid", "*", False),
    ("fl.example.invalid", "fl.example.invalid", True),
    ("fl.example.invalid", "other, FL.example.invalid ", True),
    ("fl.example.invalid", ".invalid", True),
    ("fl.example.invalid", "example.invalid", True),
    ("fl.example.invalid", "ample.invalid", False),
    ("fl.example.invalid", "*.invalid", False),
    ("127.0.0.1", "127.0.0.0/8", True),
    ("localhost", "127.0.0.0/8", False),
]


class LittleProxy(ThreadingHTTPServer):
    """Counts what it is asked; refuses all where `refusal` is a status, or who has no login."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.asked: list[str] = []
        self.refusal: int | None = None
        self.login: str | None = None  # what must stand behind Proxy-Authorization

    @property
    def url(self) -> str:
        """As an environment variable names it."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: LittleProxy

    def do_CONNECT(self) -> None:
        self.server.asked.append(self.path)
        login, host_port = self.server.login, self.path.rpartition(":")
        if self.server.refusal is not None:
            self.send_error(self.server.refusal)
        elif login and self.headers.get("Proxy-Authorization") != login:
            self.send_error(407)
        else:
            try:
                there = socket.create_connection((host_port[0], int(host_port[2])), 5)
            except OSError:
                self.send_error(502)
                return
            self.send_response(200)
            self.end_headers()
            with there, contextlib.suppress(OSError):
                pass_on(self.connection, there)
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        sys.stderr.write(f"{self.command} {self.path}\n" if __name__ == "__main__" else "")


def pass_on(here: socket.socket, there: socket.socket) -> None:
    """Bytes both ways, until one side ends."""
    other = {here: there, there: here}
    while True:
        for stream in select.select([here, there], [], [])[0]:
            if not (content := stream.recv(1 << 16)):
                return
            other[stream].sendall(content)


@contextlib.contextmanager
def little_proxy() -> Iterator[LittleProxy]:
    """One that runs in a thread of this process, on a free port of loopback."""
    with LittleProxy(("127.0.0.1", 0)) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()


if __name__ == "__main__":
    LittleProxy(("", int(sys.argv[1]))).serve_forever()
