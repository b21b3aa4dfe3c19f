"""The line that tests put between a server and its sites does what it says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from slow_line import Line


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that answers with what it got."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                stream, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(stream,), daemon=True).start()

    def answer(stream: socket.socket) -> None:
        try:
            while piece := stream.recv(65536):
                stream.sendall(piece)
        except OSError:
            pass
        finally:
            stream.close()

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def connect(line: Line) -> socket.socket:
    return socket.create_connection(("127.0.0.1", line.port), 5.0)


def ask(stream: socket.socket, size: int) -> float:
    """Seconds until so many bytes were sent and came back, the same."""
    began = time.monotonic()
    sent = bytes(i % 251 for i in range(size))

    def send() -> None:
        with contextlib.suppress(OSError):
            stream.sendall(sent)

    threading.Thread(target=send, daemon=True).start()
    got = b""
    while len(got) < size:
        piece = stream.recv(65536)
        if not piece:
            raise ConnectionResetError
        got += piece
    assert got == sent
    return time.monotonic() - began


def test_rate_and_delay_hold_and_bytes_are_counted(echo: int) -> None:
    with Line(echo, megabytes_per_second=1.0, delay_seconds=0.05) as line, connect(line) as one:
        assert 0.1 <= ask(one, 1) < 0.5  # there and back
        assert 0.5 <= ask(one, 500_000) < 3.0
        assert (line.up, line.down) == (500_001, 500_001)
        with connect(line) as other:  # both share the rate
            seconds: list[float] = []
            threads = [
                threading.Thread(target=lambda s=stream: seconds.append(ask(s, 300_000)))
                for stream in (one, other)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert max(seconds) >= 0.6


def test_after_a_silent_cut_everything_goes_on_where_it_was(echo: int) -> None:
    with Line(echo) as line, connect(line) as one:
        ask(one, 10)
        line.cut()
        one.settimeout(0.3)
        one.sendall(b"late")
        with pytest.raises(TimeoutError):
            one.recv(4)
        line.heal()
        one.settimeout(5.0)
        assert one.recv(4) == b"late"


def test_a_reset_ends_connections_and_refuses_new_ones_until_healed(echo: int) -> None:
    with Line(echo) as line, connect(line) as one:
        ask(one, 10)
        line.cut("reset")
        with pytest.raises(ConnectionError):
            ask(one, 10)
        with pytest.raises(ConnectionError), connect(line) as new:
            ask(new, 10)
        line.heal()
        with connect(line) as new:
            ask(new, 10)


def test_a_forgotten_connection_stays_silent_and_a_new_one_passes(echo: int) -> None:
    with Line(echo) as line, connect(line) as one:
        ask(one, 10)
        line.cut_for(0.1, "forgotten")
        one.settimeout(0.5)
        with pytest.raises(TimeoutError):
            ask(one, 10)
        with connect(line) as new:
            ask(new, 10)
        assert line.connections == 2
