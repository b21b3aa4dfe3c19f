"""Lines between a server and its sites that are slow, far, or cut: a TCP proxy for each site.

    lines = Lines(megabytes_per_second=1.0, delay_seconds=0.1)
    federation = FederationBehindLines(run, sites, recipe, None, tell, lines=lines)
    with lines, federation.running() as coordinator:
        lines["site-1"].cut("forgotten")
        ...
        lines["site-1"].heal()
        print(lines["site-1"].up, lines["site-1"].down)  # bytes

A site's FLARE client and its job processes connect to the proxy's port on the same host name, so
that TLS, which passes through unopened, still finds the names that it knows. The server listens as
ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal

from fedfms.flare.simulate import Federation
from fedfms.local.sites import Site

# silent: nothing passes, and all goes on where it was once the line is there again, as TCP does.
# reset: what is connected is reset, and new connections too as long as the line is cut.
# forgotten: nothing passes, and connections of before stay silent for ever, as behind a firewall or
# an address translation that was started again; new ones pass once the line is there again.
Cut = Literal["silent", "reset", "forgotten"]

_PIECE = 16 * 1024  # bytes that are carried at once
_BUFFER = 256 * 1024  # of the kernel, towards each side: what a sender thinks is under way
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class Line:
    """A line to one TCP port of this machine, of a given rate and delay, that can be cut.

    All connections share the rate, as those of one site do. `up` and `down` count bytes that were
    sent into the line, from and to the site; what a reset threw away on its way counts too.

    Args:
        to: port that is behind the line, on the loopback interface.
        megabytes_per_second: each way; None: as fast as the machine. May be set at any time.
        delay_seconds: one way. May be set at any time.
    """

    def __init__(
        self,
        to: int,
        *,
        megabytes_per_second: float | None = None,
        delay_seconds: float = 0.0,
    ) -> None:
        self.to = to
        self.megabytes_per_second = megabytes_per_second
        self.delay_seconds = delay_seconds
        self.port = 0  # where sites connect; known once it is started
        self.up = 0
        self.down = 0
        self.connections = 0  # that were made so far
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="line", daemon=True)
        self._server: asyncio.Server | None = None
        self._cut: Cut | None = None
        self._ways: set[_Way] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._free_at = {"up": 0.0, "down": 0.0}  # when what was sent so far has left

    # ------------------------------------------------------------------------- from any thread

    def start(self) -> Line:
        """Listen on a free port."""
        self._thread.start()
        self._wait(self._listen())
        return self

    def stop(self) -> None:
        """End all connections and listen no more; doing it twice does no harm."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self._wait(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def cut(self, how: Cut = "silent") -> None:
        """Cut the line until `heal`; see `Cut` for what the connections notice."""
        self._wait(self._cut_now(how))

    def heal(self) -> None:
        """Let everything pass again."""
        self._wait(self._heal_now())

    def cut_for(self, seconds: float, how: Cut = "silent") -> None:
        """Cut, wait, heal."""
        self.cut(how)
        try:
            time.sleep(seconds)
        finally:
            self.heal()

    @property
    def is_cut(self) -> bool:
        """Whether nothing passes now."""
        return self._cut is not None

    def __enter__(self) -> Line:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def _wait(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30.0)

    # -------------------------------------------------------------------------- in the loop

    async def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)  # connections inherit it
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._take, sock=listener, limit=2 * _PIECE)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for way in list(self._ways):
            way.end(reset=True)

    async def _cut_now(self, how: Cut) -> None:
        self._cut = how
        for way in list(self._ways):
            way.open.clear()
            if how == "reset":
                way.end(reset=True)
            elif how == "forgotten":
                way.is_forgotten = True

    async def _heal_now(self) -> None:
        self._cut = None
        for way in self._ways:
            if not way.is_forgotten:
                way.open.set()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        way = _Way(writer)
        self._ways.add(way)
        try:
            if self._cut == "reset":
                way.end(reset=True)
                return
            if self._cut is None:
                way.open.set()
            await way.open.wait()
            self.connections += 1
            far_reader, far_writer = await asyncio.open_connection(
                "127.0.0.1", self.to, limit=2 * _PIECE
            )
            way.add(far_writer)
            await _both(
                self._carry("up", way, reader, far_writer),
                self._carry("down", way, far_reader, writer),
            )
            way.end()
        except (OSError, asyncio.CancelledError):
            way.end(reset=True)  # the other side learns it as it was
        finally:
            self._ways.discard(way)
            self._tasks.discard(task)

    async def _carry(
        self,
        direction: Literal["up", "down"],
        way: _Way,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Take pieces at the line's rate; each arrives its delay later, in order."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, piece = await under_way.get()
                await _until(at)
                await way.open.wait()
                if not piece:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(piece)
                await writer.drain()

        async def take() -> None:
            while True:
                piece = await reader.read(_PIECE)
                await way.open.wait()
                if piece and self.megabytes_per_second is not None:
                    begins = max(time.monotonic(), self._free_at[direction])
                    leaves = begins + len(piece) / (self.megabytes_per_second * 1e6)
                    self._free_at[direction] = leaves
                    await _until(leaves)
                    await way.open.wait()
                if direction == "up":
                    self.up += len(piece)
                else:
                    self.down += len(piece)
                under_way.put_nowait((time.monotonic() + self.delay_seconds, piece))
                if not piece:
                    return

        await _both(take(), deliver())


class _Way:
    """One connection: its two sockets, and whether anything passes."""

    def __init__(self, near: asyncio.StreamWriter) -> None:
        self.open = asyncio.Event()
        self.is_forgotten = False
        self._writers = [near]

    def add(self, far: asyncio.StreamWriter) -> None:
        for writer in (*self._writers, far):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writers.append(far)

    def end(self, *, reset: bool = False) -> None:
        for writer in self._writers:
            if reset:
                with contextlib.suppress(OSError):
                    found = writer.get_extra_info("socket")
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                writer.transport.abort()
            else:
                writer.close()


async def _both(*work: Coroutine[Any, Any, None]) -> None:
    """Do both at once; where one fails, the other is ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until(at: float) -> None:
    if (left := at - time.monotonic()) > 0:
        await asyncio.sleep(left)


class Lines(Mapping[str, Line]):
    """A line for each site, made when the site is started; all of the same rate and delay.

    Args:
        megabytes_per_second, delay_seconds: see `Line`; both may be set for one site later.
    """

    def __init__(
        self, *, megabytes_per_second: float | None = None, delay_seconds: float = 0.0
    ) -> None:
        self.megabytes_per_second = megabytes_per_second
        self.delay_seconds = delay_seconds
        self._lines: dict[str, Line] = {}

    def add(self, site: str, to: int) -> Line:
        """A started line for a site that has none yet; else the one that it has."""
        if site not in self._lines:
            self._lines[site] = Line(
                to,
                megabytes_per_second=self.megabytes_per_second,
                delay_seconds=self.delay_seconds,
            ).start()
        return self._lines[site]

    def stop(self) -> None:
        """End all of them."""
        for line in self._lines.values():
            line.stop()

    def __getitem__(self, site: str) -> Line:
        return self._lines[site]

    def __iter__(self) -> Any:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()


class FederationBehindLines(Federation):
    """A federation of processes with each site behind a line of its own; see the module.

    Args:
        lines: the others are those of `Federation`.
    """

    untold_line = None  # as at a server and a site of which nobody said anything

    def __init__(self, *args: Any, lines: Lines, **named: Any) -> None:
        super().__init__(*args, **named)
        self.lines = lines

    def _start_site(self, site: Site, kit: Path) -> None:
        put_behind(kit, self.lines, site.name)
        super()._start_site(site, kit)


def put_behind(kit: Path, lines: Lines, site: str) -> Line:
    """Let a site's kit connect through a line, which is made for it.

    The kit's signed checksums do not fit any more: such a kit is for FLARE's own start, as
    `Federation` does it.
    """
    file = kit / "startup" / "fed_client.json"
    content = json.loads(file.read_text())
    service = content["servers"][0]["service"]
    host, _, port = service["target"].rpartition(":")
    line = lines.add(site, int(port))
    service["target"] = f"{host}:{line.port}"
    file.write_text(json.dumps(content, indent=2))
    return line
