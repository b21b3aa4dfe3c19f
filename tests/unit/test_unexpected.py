"""What nobody foresaw: a problem with its fix for a person, a traceback for who mends it."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedfms.contracts.site import SiteConfig
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import SiteDataError, unexpected
from fedfms.local.synthetic import write_phantom_site

JOBS = Path(__file__).resolve().parents[2] / "jobs"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    write_phantom_site(tmp_path / "site", "bright", cases=10, slices=1, seed=3)
    return tmp_path / "site"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Let the n-th call of numpy's percentile, which training takes of an image, raise."""
    percentile, calls = np.percentile, []

    def raises(*arguments, **named):
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return percentile(*arguments, **named)

    monkeypatch.setattr(np, "percentile", raises)


@pytest.mark.parametrize(
    ("error", "problem", "fix"),
    [
        (KeyError("tag"), "KeyError: 'tag'", "report"),
        (MemoryError(), "MemoryError", "memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "not enough", "memory"),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), "/a/b: No such file", "there"),
        (ValueError("one\ntwo\nthree"), "ValueError: one", "report"),
    ],
)
def test_an_exception_becomes_one_line_and_what_to_do(error, problem, fix):
    told = unexpected(error, "a.png cannot be read", SiteDataError)
    assert isinstance(told, SiteDataError)
    assert told.problem.startswith("a.png cannot be read: ")
    assert problem in told.problem
    assert "\n" not in told.problem
    assert fix in told.fix
    assert "a.png" not in told.public


def test_its_traceback_is_kept_as_text_and_holds_no_array():
    array = np.zeros(3)
    kept = weakref.ref(array)

    def fails(values: np.ndarray) -> None:
        raise ZeroDivisionError(values.shape)

    try:
        fails(array)
    except ZeroDivisionError as error:
        told = unexpected(error, "it fails", SiteDataError)
    assert "in fails" in told.details
    del array
    gc.collect()
    assert kept() is None


def test_no_command_ends_with_a_traceback_on_the_terminal(run: Run, site, temporary, monkeypatch):
    def broken(*arguments, **named):
        raise ZeroDivisionError("a library's own")

    monkeypatch.setattr("safetensors.torch.save", broken)
    out_file = site.parent / "new" / "folder" / "m.safetensors"
    code, out, err = run(
        *("train-local", JOBS / "fedmsa", "--site", site / "site.yml", "--output", out_file),
        *("--set", "rounds=1", "--set", "image_size=64"),
    )
    assert code == 1
    assert out_file.parent.is_dir()
    assert "Traceback" not in out + err
    (details,) = temporary.glob("fedfms-error-*.txt")
    assert "ZeroDivisionError: a library's own" in err
    assert err.count("fix:") == 1
    assert str(details) in err
    assert "in broken" in details.read_text()


def test_where_a_model_goes_is_looked_at_before_it_is_trained(run: Run, site):
    (site.parent / "taken").write_text("a file")
    code, out, err = run(
        *("train-local", JOBS / "fedmsa", "--site", site / "site.yml"),
        *("--output", site.parent / "taken" / "m.safetensors"),
    )
    assert code == 1
    assert "taken cannot be made" in err
    assert "--output" in err
    assert "round 0" not in out


def test_check_data_goes_on_after_whatever_a_library_raises(run: Run, site, monkeypatch):
    fail_at(monkeypatch, 3, MemoryError("Unable to allocate 3 TiB"))
    code, out, _ = run("check-data", site / "site.yml", "--json")
    assert code == 1
    told = json.loads(out)
    findings = told["findings"] if isinstance(told, dict) else told
    (finding,) = [one for one in findings if one["severity"] == "error"]
    assert re.search(r"phantom-00\d.nii.gz cannot be checked", finding["problem"])
    assert "more with the same problem" not in finding["problem"]
    assert "Unable to allocate 3 TiB" in finding["problem"]
    assert "memory" in finding["fix"]


def test_training_names_the_case_at_which_a_library_raised(site, monkeypatch):
    config = SiteConfig.from_yaml(site / "site.yml")
    cases = find_cases(config)
    fail_at(monkeypatch, 2, RecursionError("maximum recursion depth exceeded"))
    with pytest.raises(SiteDataError, match="maximum recursion depth") as error:
        prepare_cases(cases, config)
    assert cases[1].image.name in error.value.problem
    assert "in raises" in error.value.details
    assert cases[1].image.name not in error.value.public
