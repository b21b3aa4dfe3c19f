from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
from nvflare.apis.fl_context import FLContext

from fedfms.contracts.announcement import Announcement, Slicing
from fedfms.contracts.messages import encode
from fedfms.flare.announce import SiteResources, read_announcement

PONG = Announcement(
    site="site-1",
    version="0.1.0",
    busy=True,
    classes=("disc", "cup"),
    not_annotated=("rim",),
    methods=("fedmsa",),
    max_rounds=7,
    device="cuda",
    slicing=Slicing("coronal", "gray", "window:40:400", (3.0, 0.75, 0.75)),
    overlapping=(("disc", "cup"),),
)


def answer_once(exchange: Path, line: bytes) -> threading.Thread:
    """A trainer that answers one ping with this line."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(exchange / "trainer.sock"))
    listener.listen(1)

    def serve() -> None:
        with listener, listener.accept()[0] as stream:
            stream.recv(1000)
            stream.sendall(line)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def reported(exchange: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """What FLARE's client sends; its message is JSON, and the server's table Python's own text."""
    monkeypatch.setenv("FEDFMS_EXCHANGE", str(exchange))
    return str(json.loads(json.dumps(SiteResources().report_resources(FLContext()))))


def test_what_the_trainer_says_reaches_the_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_once(tmp_path, encode(PONG))
    assert read_announcement("site-1", reported(tmp_path, monkeypatch)) == Announcement(
        site="site-1",
        version="0.1.0",
        classes=("disc", "cup"),
        not_annotated=("rim",),
        methods=("fedmsa",),
        max_rounds=7,
        device="cuda",
        busy=True,
        slicing=Slicing("coronal", "gray", "window:40:400", (3.0, 0.75, 0.75)),
        overlapping=(("disc", "cup"),),
    )


@pytest.mark.parametrize("told", [{}, {"slicing": None}])
def test_a_trainer_of_an_older_version_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict
) -> None:
    line = json.loads(encode(PONG))
    del line["slicing"], line["overlapping"]
    answer_once(tmp_path, json.dumps({**line, **told}).encode() + b"\n")
    announced = read_announcement("site-1", reported(tmp_path, monkeypatch))
    assert (announced.ready, announced.device, announced.slicing) == (True, "cuda", None)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (encode(Announcement("site-1", "0.1.0", False, "no-policy")), "no-policy"),
        (b'{"type":"pong","protocol":1,"site":"s","version":"1","busy":false}\n', "other-protocol"),
        (b"who are you?\n", "nonsense"),
        (b"", "trainer-died"),
    ],
)
def test_whatever_is_wrong_with_the_trainer_is_told_as_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, fault: str
) -> None:
    answer_once(tmp_path, line)
    told = read_announcement("site-1", reported(tmp_path, monkeypatch))
    assert (told.ready, told.fault) == (False, fault)


def test_without_a_trainer_or_an_exchange_folder_a_site_still_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reported(tmp_path, monkeypatch) == str(
        {"fedfms": {"ready": False, "fault": "no-trainer"}}
    )
    monkeypatch.delenv("FEDFMS_EXCHANGE")
    told = SiteResources().report_resources(FLContext())
    assert told == {"fedfms": {"ready": False, "fault": "no-exchange"}}


@pytest.mark.parametrize(
    "said",
    [
        None,
        "",
        "No replies",
        "not authorized",
        "{'resources': [], 'reserved_resources': {}}",
        "{'fedfms': 3}",
        "{'fedfms': {'ready': True}}",
        "{'fedfms': {'ready': True, 'fault': None, 'version': '/etc/passwd <script>'}}",
        "__import__('os').getcwd()",
        "[" * 10_000,
    ],
)
def test_what_cannot_be_understood_is_no_announcement(said: object) -> None:
    assert read_announcement("site-1", said) == Announcement("site-1", fault="not-told")
