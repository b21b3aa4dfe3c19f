"""A line between a site and the server at which TLS ends, so that what crosses it can be read.

It has the server's key towards the site, and the site's towards the server, as nobody has but who
made the kits. What the site sent is kept as it is inside of TLS: HTTP/2 with gRPC in it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedfms.flare.simulate import SERVER, Federation
from fedfms.local.sites import Site

_PIECE = 2**18  # bytes that are carried at once


class OpenLine:
    """Listens on a port for one site, and keeps what it sends, connection by connection.

    Args:
        to: the server's port on the loopback interface.
        server, site: their kits.
    """

    def __init__(self, to: int, server: Path, site: Path) -> None:
        self.sent: list[bytearray] = []
        self.port = 0
        self._to = to
        self._near = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._near.load_cert_chain(server / "startup/server.crt", server / "startup/server.key")
        self._far = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._far.load_cert_chain(site / "startup/client.crt", site / "startup/client.key")
        self._far.load_verify_locations(site / "startup/rootCA.pem")
        for one in (self._near, self._far):
            one.set_alpn_protocols(["h2"])
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="open line", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10.0)

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0, ssl=self._near)
        self.port = server.sockets[0].getsockname()[1]

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = bytearray()
        self.sent.append(kept)
        try:
            far_reader, far_writer = await asyncio.open_connection(
                "127.0.0.1", self._to, ssl=self._far, server_hostname=SERVER
            )
        except OSError:
            writer.close()
            return
        await asyncio.gather(_carry(reader, far_writer, kept), _carry(far_reader, writer, None))


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray | None
) -> None:
    try:
        while piece := await reader.read(_PIECE):
            if kept is not None:
                kept += piece
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


class FederationOverOpenLines(Federation):
    """A federation of processes of which one can read what the sites send to the server."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._lines: list[OpenLine] = []

    @property
    def sent(self) -> Sequence[bytearray]:
        """What all sites sent so far, connection by connection."""
        return [kept for line in self._lines for kept in line.sent]

    def _start_site(self, site: Site, kit: Path) -> None:
        file = kit / "startup" / "fed_client.json"
        content = json.loads(file.read_text())
        service = content["servers"][0]["service"]
        host, _, port = service["target"].rpartition(":")
        line = OpenLine(int(port), self.kit(SERVER), kit)
        self._lines.append(line)
        service["target"] = f"{host}:{line.port}"
        file.write_text(json.dumps(content, indent=2))
        super()._start_site(site, kit)
