"""What a person compares, copies or types again is printed as it is: no emoji, markup or edge."""

from __future__ import annotations

import inspect
import ipaddress
import json
import pkgutil
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from fedfms import cli
from fedfms.cli import common, export, jobs, kits, main, predict, site
from fedfms.contracts.announcement import Announcement
from fedfms.contracts.now import SiteNow
from fedfms.errors import ConfigError
from fedfms.export.run import Exported, ExportedFile
from fedfms.flare.progress import Event
from fedfms.flare.session import JobState
from fedfms.predict.find import Item as Image
from fedfms.predict.run import Predicted
from fedfms.preflight.items import Item
from fedfms.provisioning.project import Participant
from fedfms.provisioning.provision import MadeKit, Provisioned

Run = Callable[..., tuple[int, str, str]]

AWKWARD = (
    *("a:CD:b", ":AB:", "::ab:cd:", ":smile:", "fe80::ab:1", "2001:db8::cd:"),
    *("[red]", "[/]", "[/red]", "[bold]x[/]", "[link=a]b[/link]", "[", "]", "[[x]]", "x\\[B]"),
    *("C:\\data\\", "C:\\[x]\\y", "\\", "\\\\server\\[share]", "name: with, punctuation = 1"),
    *("Müller:AB:名前", "a" * 300, "/a very/long path/with spaces" * 9),
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's usual width."""
    monkeypatch.setenv("COLUMNS", "80")


def fingerprints(count: int) -> list[str]:
    dice = random.Random(7)
    return [f"SHA256:{dice.randbytes(32).hex(':').upper()}" for _ in range(count)]


def made(fingerprint: str, *, name: str = "site-1", note: str = "") -> Provisioned:
    participant = Participant(name=name, type="client", org="org")
    kit = MadeKit(participant=participant, state="new", zip=Path("x.zip"), valid_until=None)
    return Provisioned(output=Path("out"), fingerprint=fingerprint, kits=[kit], notes=[note])


def test_ten_thousand_fingerprints_and_addresses_are_printed_unchanged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dice = random.Random(8)
    words = fingerprints(10_000)
    for _ in range(500):
        address = ipaddress.IPv6Address(dice.getrandbits(128) & dice.getrandbits(128))
        words += [f"{address}", f"{address.exploded}:", f"[{address}]:8002"]
    for word in words:
        common.out.print(f"certificate authority {word}")
    assert capsys.readouterr().out == "".join(f"certificate authority {word}\n" for word in words)


def test_provision_prints_the_fingerprint_that_it_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for fingerprint in fingerprints(300):
        kits._show(made(fingerprint))
        assert f"certificate authority {fingerprint}\n" in capsys.readouterr().out


@pytest.mark.parametrize("word", AWKWARD)
def test_every_command_prints_a_value_unchanged(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each function that prints for a command, with the same value wherever one may stand."""
    event = Event(
        phase="train",
        text=word,
        round=0,
        rounds=2,
        answered=(word,),
        sites=(word,),
        missed=(word,),
        now=(SiteNow(name=word, phase="failed", failure=word),),
    )
    state = JobState(
        status="RUNNING", detail=word, job_id="j", name=word, submitted="t", submitter=word
    )
    one = Announcement(
        site=word, classes=(word,), not_annotated=(word,), device=word, fault=word, methods=(word,)
    )
    image = Image(word, Path("a"), "image", Path(word), (), ())
    used = {
        **dict.fromkeys(("name", "model", "plane", "channels", "intensity", "site"), word),
        **dict.fromkeys(("model_sha256", "probability_threshold", "device"), "0"),
    }
    done = [
        Predicted(image, (1,), None, 0),
        Predicted(image, (), None, 0, ConfigError(word, word)),
    ]
    exported = Exported("fedfms", "vit_b", 128, (ExportedFile(Path(word), 1, "0"),), (word,), None)
    common.logging_progress({"train": word})(event)
    heard = capsys.readouterr().err
    assert heard.count(word) >= 3  # a sentence is said once

    print_it: dict[str, tuple[Callable[[], object], int]] = {
        "provision": (lambda: kits._show(made(word, name=word, note=word)), 3),
        "check-site": (lambda: site._show_item(Item("kit", "FAIL", word, word)), 2),
        "submit": (lambda: jobs._saying(False)(word), 1),
        "status": (lambda: common.out.print(common.WholeWords(jobs._sites_table([one]))), 5),
        "status of jobs": (
            lambda: common.out.print(common.WholeWords(jobs._jobs_table([state]))),
            2,
        ),
        "status of a job": (lambda: jobs._show_job(state, event, as_json=False), 5),
        "predict": (
            lambda: predict._show(used, [word], done, done[1:], Path(word)),
            12,
        ),
        "export": (lambda: common.out.print(export._next_command(exported, Path(word))), 1),
        "JSON": (lambda: common.out.print_json(json.dumps({"a": [word]})), 0),
    }
    for name, (show, times) in print_it.items():
        show()
        said = capsys.readouterr()
        assert (said.out + said.err).count(word) >= times, (name, said)
        if name == "JSON":
            assert json.loads(said.out) == {"a": [word]}


def test_commands_that_run_print_the_path_that_was_typed(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "[red] :CD: [" / "C:\\x\\"
    folder.mkdir(parents=True)
    code, out, _ = run("new-site", "clinic", folder / "a")
    assert code == 0 and f"{folder / 'a'}: edit" in out
    code, out, _ = run(
        "request", "clinic", "--org", "o", "--project", "p", "--output", folder / "r"
    )
    assert code == 0 and f"keep {folder / 'r'}:" in out
    code, _, err = run("check-data", folder / "none.yml")
    assert code == 1 and f"there is no {folder / 'none.yml'}" in err
    code, _, err = run("install", folder / "k.zip", "--request", folder / "r", "--fingerprint", "x")
    assert code == 1 and str(folder) in err
    code, _, err = run("archive", folder, "--image", "[red]:CD:")
    assert code == 1 and f"{folder} is there already" in err
    code, out, _ = run("synth", folder / "phantoms", "--cases", 8, "--slices", 1)
    assert code == 0 and f"{folder / 'phantoms'}: " in out


@pytest.mark.parametrize(
    "arguments", [["{}"], ["--{}"], ["synth", "x", "--cases", "{}"], ["check-site", "--role", "{}"]]
)
def test_a_wrong_command_line_is_said_in_one_line(run: Run, arguments: list[str]) -> None:
    word = "[red]:CD:[/]" + "/very long" * 20
    code, out, err = run(*(one.format(word) for one in arguments))
    assert (code, out) == (2, "")
    problem, fix = err.splitlines()
    assert problem.startswith("error: ") and fix.startswith("  fix: fedfms ")
    if "--cases" not in arguments:  # of a number, typer says what it should be
        assert word in problem


def test_a_name_that_is_no_text_ends_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of files are bytes; such as come from an older machine are no UTF-8."""
    monkeypatch.setattr(sys, "argv", ["fedfms", "check-data", "/M\udcfcller/site.yml"])
    with (tmp_path / "err").open("w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with pytest.raises(SystemExit):
            main()
    said = (tmp_path / "err").read_text(encoding="utf-8")  # still UTF-8, for whoever reads it
    assert r"there is no /M\udcfcller/site.yml" in said


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_table_cuts_no_word(is_terminal: bool) -> None:
    table = Table("participant", "kit")
    words = ["b" * 90, "/data/" + "c" * 70]
    table.add_row(*words)
    console = common.Console(
        force_terminal=is_terminal, width=80, soft_wrap=True, emoji=False, markup=False
    )
    with console.capture() as captured:
        console.print(common.WholeWords(table))
    assert all(word in captured.get() for word in words)


def test_no_command_has_a_printer_of_its_own() -> None:
    for module in pkgutil.iter_modules(cli.__path__):
        source = inspect.getsource(__import__(f"fedfms.cli.{module.name}", fromlist=["x"]))
        assert "rich.markup" not in source, module.name
        assert source.count("Console(") == (2 if module.name == "common" else 0), module.name
        assert source.count('TextColumn("') == source.count("markup=False)"), module.name
