"""How fast a site's line is, what that means for a round, and what to write in `.env`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_kits import FEDFMS, Made

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs"))

from slow_line import Line as SlowLine
from slow_line import Lines, put_behind

from fedfms.contracts.recipe import Recipe
from fedfms.errors import FedfmsError
from fedfms.flare.internals.server import Asked
from fedfms.flare.link import BUDGET_SECONDS, HEADER, PIECE, REFUSED, TOLD, WAIT, LinkMeter
from fedfms.flare.measure_link import measure
from fedfms.kits.kit import Kit, read_kit
from fedfms.models.build import build_model
from fedfms.models.travelling import travelling_names
from fedfms.preflight.link import (
    VALUES,
    Advice,
    Line,
    advise,
    as_rate,
    as_time,
    round_times,
)


def asked(name: str, wanted: int, payload: object = None, *, busy: bool = False) -> Asked:
    return Asked(name, revoked=False, wanted=wanted, payload=payload, busy=busy)


# ----------------------------------------------------------------------------- what it means


@pytest.mark.parametrize("method", VALUES)
def test_the_sizes_are_those_of_the_methods(method: str) -> None:
    recipe = Recipe(
        method=method, backbone="vit_b", backbone_sha256="0" * 64, classes=("lesion",), rounds=1
    )
    model = build_model(recipe, None)
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    assert sum(sizes[name] for name in travelling_names(model)) == VALUES[method]


def test_a_round_takes_both_transfers() -> None:
    times = {(one.method, one.precision): one for one in round_times(Line(down=2.0, up=0.5))}
    fedmsa = times["fedmsa", "fp32"]
    assert fedmsa.megabytes == pytest.approx(42.4, abs=0.05)
    # a little more than the tensors crosses the line
    assert fedmsa.down == pytest.approx(42.4 / 2, rel=0.05) and fedmsa.down > 42.4 / 2
    assert fedmsa.seconds == fedmsa.down + fedmsa.up == pytest.approx(42.4 * 2.5, rel=0.05)
    assert times["fedmsa", "fp16"].seconds == pytest.approx(fedmsa.seconds / 2)


@pytest.mark.parametrize(
    ("line", "told", "advice"),
    [
        (Line(down=5.0, up=0.4), None, Advice(None, None)),  # good without a word
        (Line(down=5.0, up=0.239), None, Advice("0.23", None)),
        (Line(down=0.099, up=1.0), None, Advice(None, "0.099")),
        (Line(down=0.1, up=0.1, server_told=0.1), 0.1, Advice(None, None)),
        (Line(down=0.3, up=2.0, server_told=5.0), 3.0, Advice("2", "0.3")),
        (Line(down=5.0, up=0.001), None, Advice("0.01", None)),  # the least that may be written
    ],
)
def test_what_is_to_be_written_never_promises_more_than_the_line_carries(
    line: Line, told: float | None, advice: Advice
) -> None:
    assert advise(line, told) == advice


def test_figures_are_for_people() -> None:
    assert [as_rate(rate) for rate in (0.0983, 1.24, 112.7)] == [
        *("0.098 MB/s", "1.2 MB/s", "113 MB/s")
    ]
    assert [as_time(seconds) for seconds in (0.2, 59, 200, 240, 7500)] == [
        *("1 s", "59 s", "3 min 20 s", "4 min", "2 h 5 min")
    ]


# -------------------------------------------------------------------------------- the server


def test_a_server_sends_and_takes_pieces_of_a_bounded_size() -> None:
    meter = LinkMeter(0.5)
    headers, payload = meter.answer(asked("site-1", 1000))
    assert headers == {HEADER: 0, TOLD: 0.5} and payload is not None and len(payload) == 1000
    headers, payload = meter.answer(asked("site-1", 0, bytes(700)))
    assert headers[HEADER] == 700 and payload == b""
    assert len(meter.answer(asked("site-1", 1 << 40))[1] or b"") == PIECE
    for nonsense in ("all", None, -5, 1e9):
        assert meter.answer(asked("site-1", nonsense, {"no": "bytes"}))[1] == b""  # type: ignore[arg-type]


@pytest.mark.parametrize(("busy", "pieces"), [(False, 11), (True, 2)])
def test_a_site_has_a_budget_that_is_small_while_a_job_runs(busy: bool, pieces: int) -> None:
    clock = [0.0]
    meter = LinkMeter(now=lambda: clock[0])
    for number in range(pieces):
        clock[0] = float(number)
        assert REFUSED not in meter.answer(asked("site-1", PIECE, busy=busy))[0]
    headers, payload = meter.answer(asked("site-1", PIECE, busy=busy))
    assert headers[REFUSED] == "budget" and payload is None
    assert 0 < headers[WAIT] <= BUDGET_SECONDS
    assert REFUSED not in meter.answer(asked("site-2", PIECE, busy=busy))[0]  # it has its own
    clock[0] += headers[WAIT] + 0.1
    assert REFUSED not in meter.answer(asked("site-1", PIECE, busy=busy))[0]


def test_all_sites_together_have_a_budget_too() -> None:
    meter = LinkMeter(now=lambda: 0.0)
    served = 0
    while REFUSED not in meter.answer(asked(f"site-{served}", PIECE, busy=True))[0]:
        served += 1
    assert 5 < served < 20


def test_a_disabled_site_gets_no_byte() -> None:
    headers, payload = LinkMeter().answer(Asked("site-1", True, 1000, None, False))
    assert headers[REFUSED] == "revoked" and payload is None


# ------------------------------------------------------------------------------ both together


@pytest.fixture
def behind(made: Made, tmp_path: Path, server: Path) -> Iterator[tuple[Kit, SlowLine]]:
    """A site's kit behind a line of 2 MB/s, 50 ms each way."""
    import shutil

    folder = tmp_path / "kit"
    shutil.copytree(made.kit("site-2"), folder)
    with Lines(megabytes_per_second=2.0, delay_seconds=0.05) as lines:
        line = put_behind(folder, lines, "site-2")
        yield read_kit(folder), line


def test_a_line_is_measured_as_fast_as_it_is(behind: tuple[Kit, SlowLine]) -> None:
    kit, line = behind
    found = measure(kit)
    assert found.round_trip == pytest.approx(0.1, abs=0.1) and found.round_trip >= 0.1
    for rate in (found.down, found.up):
        assert 1.2 < rate < 2.2
    assert max(line.up, line.down) < 11e6


def test_a_line_that_is_reset_is_said_to_be_broken(behind: tuple[Kit, SlowLine]) -> None:
    kit, line = behind

    def cut(what: str) -> None:
        if what == "down":
            line.cut("reset")

    with pytest.raises(FedfmsError) as error:
        measure(kit, cut)
    assert error.value.code == "link-slow" and "network's administrators" in error.value.fix


def test_the_command_says_what_a_round_takes(made: Made, server: Path) -> None:
    command = [*FEDFMS, "link", "--kit", str(made.kit("line-2"))]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["down"] > 1 and said["up"] > 1 and said["round_trip"] < 5
    assert {(one["method"], one["precision"]) for one in said["rounds"]} >= {("fedsam", "fp16")}
    assert said["link_mb_per_second"] == {"site": None, "server": None}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "fedmsa fp32" in done.stdout and "nothing to write" in done.stdout
