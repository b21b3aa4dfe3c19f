"""A field of the announcement is declared once: everything between its ends is generic."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fedfms.contracts import announcement, messages
from fedfms.contracts.announcement import Announcement, Slicing
from fedfms.contracts.decode import Misfits
from fedfms.contracts.messages import decode_answer, encode
from fedfms.contracts.wire import Count
from fedfms.flare.announce import KEY, read_announcement

TOLD = Announcement(
    "site-1",
    "0.1.0",
    classes=("disc",),
    methods=("fedsam",),
    max_rounds=3,
    device="cpu",
    slicing=Slicing("axial", "gray", "range:0:255", (3.0, 1.0, 1.0)),
)


def to_the_coordinator(told: Announcement) -> Announcement:
    """Trainer to FLARE client to coordinator, as it goes over the socket and through FLARE."""
    answer = decode_answer(encode(told))
    assert isinstance(answer, Announcement)
    return read_announcement(told.site, str(json.loads(json.dumps({KEY: answer.to_dict()}))))


def test_what_a_site_says_arrives_whole() -> None:
    assert to_the_coordinator(TOLD) == TOLD


def test_a_field_that_is_declared_travels_without_another_line_of_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newer: Any = dataclasses.make_dataclass(
        "Newer",
        [("gpu_memory_bytes", Count, dataclasses.field(default=0))],
        bases=(Announcement,),
        frozen=True,
    )
    monkeypatch.setitem(messages._ANSWERS, "pong", newer)
    told = newer(**{f.name: getattr(TOLD, f.name) for f in dataclasses.fields(TOLD)})
    told = dataclasses.replace(told, gpu_memory_bytes=8 * 10**9)
    answer = decode_answer(encode(told))
    assert answer == told
    over_flare = json.loads(json.dumps(answer.to_dict()))  # type: ignore[union-attr]
    assert newer.from_dict({**over_flare, "site": "site-1"}) == told
    assert read_announcement("site-1", {KEY: over_flare}) == TOLD  # who does not know the field
    with pytest.raises(Misfits):
        newer.from_dict({**over_flare, "gpu_memory_bytes": "much"})


def test_names_and_fields_of_a_newer_site_do_no_harm() -> None:
    newer = {**json.loads(encode(TOLD)), "methods": ["fedsam", "lora_2"], "relays": [{"a": 1}]}
    newer["slicing"]["thickness_mm"] = 3
    answer = decode_answer(json.dumps(newer).encode())
    assert answer == dataclasses.replace(TOLD, methods=("fedsam", "lora_2"))
    del newer["type"], newer["protocol"]
    assert read_announcement("site-1", {KEY: newer}) == answer


@pytest.mark.parametrize(
    ("key", "value"), [("max_rounds", "3"), ("classes", ["a file.nii"]), ("busy", 1)]
)
def test_a_known_field_of_another_type_is_told_as_a_code(key: str, value: object) -> None:
    said = {**TOLD.to_dict(), key: value}
    assert read_announcement("site-1", {KEY: said}) == Announcement("site-1", fault="not-told")


def test_what_another_site_would_be_called_is_not_taken_from_its_own_word() -> None:
    said = {**TOLD.to_dict(), "site": "site-2"}
    assert read_announcement("site-1", {KEY: said}).site == "site-1"
    assert announcement.Announcement("site-1").ready
