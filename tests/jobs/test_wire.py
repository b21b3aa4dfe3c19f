"""What really crosses the network, counted between the sites and the server, with ViT-B."""

from __future__ import annotations

import bisect
import hashlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from federations import JOBS, of_kind, read_records, write_sites

import fedfms.flare.simulate
from fedfms.contracts.recipe import Recipe
from fedfms.local.sites import find_sites
from fedfms.models.build import build_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VALUES = 10_607_232  # FedMSA, ViT-B, one class


@dataclass
class CountingForwarder:
    """A TCP forwarder on loopback that notes when how many bytes went which way."""

    target_port: int
    port: int = 0
    up: list[tuple[float, int]] = field(default_factory=list)  # (time, bytes in total)
    down: list[tuple[float, int]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            site, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", self.target_port))
            for source, sink, log in ((site, server, self.up), (server, site, self.down)):
                threading.Thread(target=self._pump, args=(source, sink, log), daemon=True).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, log: list[tuple[float, int]]
    ) -> None:
        try:
            while data := source.recv(1 << 20):
                with self._lock:
                    log.append((time.time(), (log[-1][1] if log else 0) + len(data)))
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    @staticmethod
    def between(log: list[tuple[float, int]], start: float, end: float) -> int:
        """Bytes that were noted from `start` to `end`."""

        def total(moment: float) -> int:
            index = bisect.bisect_right(log, (moment, 1 << 62))
            return log[index - 1][1] if index else 0

        return total(end) - total(start)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ViT-B weights in the layout of Meta's file, which cannot be had offline."""
    recipe = Recipe(
        method="fedsam", backbone="vit_b", backbone_sha256="0" * 64, classes=("lesion",), rounds=1
    )
    state = build_model(recipe, None).state_dict()
    path = tmp_path_factory.mktemp("checkpoints") / "sam_vit_b_01ec64.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp16", 2)])
def test_bytes_of_a_round_on_the_wire_are_values_times_width(
    precision: str,
    width: int,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sites = write_sites(tmp_path / "sites", ("site-1", "site-2"))
    forwarders: list[CountingForwarder] = []
    provision = fedfms.flare.simulate.provision

    def provision_through_forwarder(
        folder: Path, names: list[str], port: int, admins: dict[str, str]
    ) -> Path:
        """The same kits, but the sites reach the server through the forwarder."""
        kits = provision(folder, names, port, admins)
        forwarder = CountingForwarder(port)
        forwarder.start()
        forwarders.append(forwarder)
        for name in names:
            file = kits / name / "startup" / "fed_client.json"
            settings = json.loads(file.read_text())
            service = settings["servers"][0]["service"]
            service["target"] = service["target"].replace(str(port), str(forwarder.port))
            file.write_text(json.dumps(settings))
        return kits

    monkeypatch.setattr(fedfms.flare.simulate, "provision", provision_through_forwarder)
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    fedfms.flare.simulate.simulate(
        JOBS / "fedmsa",
        find_sites(sites, None),
        overrides=[
            *("backbone=vit_b", f"backbone_sha256={sha256}", "image_size=64", "rounds=2"),
            *("local_epochs=1", f"transfer_precision={precision}"),
        ],
        results=tmp_path / "results",
        workspace=tmp_path / "workspace",
        checkpoints=checkpoint.parent,
    )

    records = read_records(tmp_path / "results")
    starts = {r["round"]: r["time"] for r in of_kind(records, "round_started")}
    ends = {r["round"]: r["time"] for r in of_kind(records, "round_done")}
    assert set(starts) == set(ends) == {0, 1}
    (forwarder,) = forwarders
    for number, start in starts.items():
        for log in (forwarder.up, forwarder.down):
            for_both_sites = forwarder.between(log, start, ends[number])
            assert for_both_sites / 2 == pytest.approx(VALUES * width, rel=0.01)
