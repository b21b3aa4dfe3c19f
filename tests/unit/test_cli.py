"""The command line as a person or a script meets it: what it prints, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedfms.cli.alone import each_alone, words
from fedfms.contracts.recipe import read_job_recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.local.sites import find_sites
from fedfms.local.synthetic import write_phantom_federation, write_phantom_site
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import write_travelling
from fedfms.training.evaluate import evaluate
from fedfms.training.pooled import PooledRound, train_pooled

JOBS = Path(__file__).resolve().parents[2] / "jobs"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    write_phantom_site(tmp_path / "site", "bright", cases=10, slices=1, seed=3)
    return tmp_path / "site"


def test_help_names_every_command_with_a_sentence(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    commands = ("synth", "simulate", "adopt", "check-data", "train-local", "report", "trainer")
    for command in (*commands, "prepare", "study", "verify", "predict", "export"):
        assert re.search(rf"{command} +\w.*", out), command


def test_a_good_site_passes(run: Run, site: Path) -> None:
    code, out, _ = run("check-data", site / "site.yml", "--classes", "lesion")
    assert code == 0
    assert "PASS" in out
    assert "0 errors, 0 warnings" in out


def test_a_broken_site_fails_with_the_problem_and_its_fix(run: Run, site: Path) -> None:
    next((site / "labels").iterdir()).unlink()
    code, out, _ = run("check-data", site / "site.yml")
    assert code == 1
    assert "1 of 10 images have no label" in out
    assert "fix:" in out
    assert "FAIL" in out


def test_a_folder_is_adopted_with_a_table_and_what_it_is_not_sure_of(
    run: Run, site: Path, tmp_path: Path
) -> None:
    (site / "site.yml").unlink()
    new = tmp_path / "new.yml"
    code, out, _ = run("adopt", site, "--output", new)
    assert code == 0
    assert re.search(r"layout +images and labels in folders of their own", out)
    assert re.search(r"images +images/\*\.nii\.gz", out) and "not sure the names of classes" in out
    code, out, _ = run("check-data", new)
    assert (code, "PASS" in out) == (0, True)
    code, _, error = run("adopt", site, "--output", new)
    assert code == 1 and "is there already and is not written over" in error
    code, out, _ = run(
        "adopt", site, "--output", tmp_path / "2.yml", "--classes", "tumour", "--json"
    )
    assert code == 0
    assert json.loads(out)["needs"] == [] and "tumour: [1]" in json.loads(out)["text"]


def test_findings_as_json_for_scripts(run: Run, site: Path) -> None:
    next((site / "images").iterdir()).write_bytes(b"")
    code, out, _ = run("check-data", site / "site.yml", "--json")
    assert code == 1
    found = json.loads(out)
    assert set(found) == {"summary", "findings"}
    (finding,) = found["findings"]
    assert finding["severity"] == "error"
    assert set(finding) == {"severity", "code", "problem", "fix"}
    assert found["summary"]["cases"] == {"train": 7, "validation": 3}
    assert found["summary"]["read"] == 9
    assert found["summary"]["classes"]["lesion"]["cases"]["train"] in (6, 7)
    assert set(found["summary"]["memory"]) == {"reading", "allowed"}
    assert found["summary"]["disk"]["cases"] == 9 * 2 * 112 * 112  # grey levels and labels


def test_the_numbers_of_the_data_as_a_table_of_80_columns(
    run: Run, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("check-data", site / "site.yml")
    assert code == 0
    *table, verdict = out.splitlines()
    assert verdict.startswith("PASS")
    assert max(len(line) for line in table) <= 80
    lines = [re.split(" {2,}", line.strip()) for line in table]
    assert ["cases", "10: 7 to train, 3 to validate"] in lines
    assert ["size", "112 rows x 112 columns"] in lines
    assert ["lesion", "10 of 10", "3", "10"] in [line[:4] for line in lines]


def test_the_sizes_of_a_job_count_in_the_check(run: Run, site: Path) -> None:
    code, out, _ = run("check-data", site / "site.yml", "--job", JOBS / "fedmsa")
    assert code == 0
    job = ("--job", JOBS / "fedmsa", "--set", "classes=lesion,vessel")
    code, out, _ = run("check-data", site / "site.yml", *job)
    assert code == 1
    assert "the job's class vessel is not in site.yml" in out
    code, _, problem = run("check-data", site / "site.yml", "--set", "image_size=64")
    assert code == 2
    assert "--job" in problem


@pytest.mark.parametrize(
    ("arguments", "problem", "fix"),
    [
        (["check-data", "nowhere/site.yml"], "there is no nowhere/site.yml", "check the path"),
        (["report", "nowhere"], "nowhere is no results folder", "name the folder"),
        (
            ["simulate", JOBS / "fedmsa", "--sites", "nowhere"],
            "nowhere holds no site",
            "fedfms synth",
        ),
        (["simulate", "nowhere", "--sites", "SITES"], "nowhere is no job folder", "jobs/fedmsa"),
        (
            ["simulate", JOBS / "fedmsa", "--sites", "SITES", "--set", "round=3"],
            "unknown key 'round'",
            "did you mean rounds?",
        ),
        (
            ["simulate", JOBS / "fedmsa", "--sites", "SITES", "--set", "holdout=site-9"],
            "site-9, which is not connected",
            "name connected sites",
        ),
        (
            ["simulate", JOBS / "fedmsa", "--sites", "SITES", "--recipe", "FEDSAM"],
            "fedsam-paper.json is a recipe of fedsam, and",
            "name jobs/fedsam",
        ),
        (
            ["submit", JOBS / "fedmsa", "--kit", "nowhere", "--recipe", "FEDSAM"],
            "fedsam-paper.json is a recipe of fedsam, and",
            "name jobs/fedsam",
        ),
        (
            ["train-local", JOBS / "fedmsa", "--site", "SITE", "--recipe", "FEDSAM"],
            "fedsam-paper.json is a recipe of fedsam, and",
            "name jobs/fedsam",
        ),
        (
            ["train-local", JOBS / "fedmsa", "--site", "SITE", "--recipe", "nowhere.json"],
            "there is no nowhere.json",
            "check the path",
        ),
        (
            ["train-local", JOBS / "fedmsa", "--site", "SITE", "--set", "classes=cyst"],
            "class cyst is not in site.yml",
            "not_annotated",
        ),
        (
            ["train-local", JOBS / "fedmsa", "--site", "SITE", "--set", "backbone=vit_b"],
            "checkpoint",
            "segment-anything",
        ),
    ],
)
def test_a_mistake_ends_with_one_message_and_no_traceback(
    run: Run, site: Path, tmp_path: Path, arguments: list, problem: str, fix: str
) -> None:
    fedsam = JOBS / "recipes" / "fedsam-paper.json"
    places = {"SITES": tmp_path, "SITE": site / "site.yml", "FEDSAM": fedsam}
    workspace = ["--workspace", tmp_path / "w"] if arguments[0] in ("simulate", "submit") else []
    code, out, err = run(*(places.get(str(a), a) for a in arguments), *workspace)
    assert code == 1
    assert problem in err
    assert fix in err.partition("fix:")[2]
    assert "Traceback" not in out + err


def test_a_workspace_that_cannot_be_written_is_named_with_the_way_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDFMS_WORKSPACE", str(tmp_path / "file"))
    for command in (("fetch", "0b52d77f"), ("submit", "fedmsa")):
        code, _, err = run(*command, "--kit", str(tmp_path))
        assert code == 1
        assert f"{tmp_path / 'file'} cannot be written" in err and "--workspace" in err


def test_ctrl_c_ends_a_command_with_one_line(
    run: Run, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "percentile", stopped)  # a library, in the middle of the work
    code, _, err = run("train-local", JOBS / "fedmsa", "--site", site / "site.yml")
    assert (code, err) == (130, "stopped\n")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("site.yml", "\nplane:\n"),
        ("site.yml", "\nworkers: two\n"),
        ("site.yml", "\nintensity: {rounding: up}\n"),
        ("policy/privacy.json", '{"min_cases": 0}'),
        ("policy/privacy.json", '{"min_cases": "3"}'),
        ("policy/privacy.json", "{"),
    ],
)
def test_a_simulation_names_the_file_of_the_site_before_anything_starts(
    run: Run, tmp_path: Path, file: str, text: str
) -> None:
    write_phantom_federation(tmp_path / "sites", cases=4, slices=1)
    path = tmp_path / "sites" / "site-2" / file
    before = path.read_text(encoding="utf-8") if file == "site.yml" else ""
    path.write_text(before + text, encoding="utf-8")
    code, _, err = run(
        *("simulate", JOBS / "fedmsa", "--sites", tmp_path / "sites"),
        *("--workspace", tmp_path / "w"),
    )
    assert code == 1
    assert str(path) in err
    assert "provisioning" not in err


def test_an_unknown_option_is_a_mistake_of_the_command_line(run: Run) -> None:
    code, _, err = run("synth", "--colour")
    assert code == 2
    assert "--colour" in err


def test_phantoms_are_not_written_over_something(run: Run, tmp_path: Path) -> None:
    assert run("synth", tmp_path / "sites", "--cases", "2", "--slices", "1")[0] == 0
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    code, _, err = run("synth", tmp_path / "sites", "--cases", "2", "--slices", "1")
    assert code == 1
    assert "is not empty" in err
    assert before == sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())


def test_local_training_learns_and_writes_what_would_travel(
    run: Run, site: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    model = tmp_path / "model.safetensors"
    code, out, _ = run(
        *("train-local", JOBS / "fedmsa", "--site", site / "site.yml"),
        *("--set", "rounds=2", "--set", "batch_size=2", "--output", model),
    )
    assert code == 0
    assert len(re.findall(r"round \d: .*lesion dice \d\.\d+", out)) == 3
    first, second = (float(value) for value in re.findall(r"loss (\d\.\d+)", out))
    assert second < first
    assert sum(array.size for array in load_file(model).values()) == 194_016
    code, _, err = run("predict", model, site / "images", tmp_path / "masks", "--device", "cpu")
    assert code == 0, err  # its recipe lies beside it

    code, _, err = run(
        *("train-local", JOBS / "fedmsa", "--site", site / "site.yml"),
        *("--set", "rounds=3", "--output", tmp_path / "other.safetensors"),
    )
    assert code == 1
    assert "is of a model with another recipe" in err
    assert not (tmp_path / "other.safetensors").exists()


def test_local_training_takes_a_recipe_in_the_place_of_the_jobs_own(run: Run, site: Path) -> None:
    code, out, _ = run(
        *("train-local", JOBS / "fedmsa", "--site", site / "site.yml"),
        *("--recipe", JOBS / "recipes" / "fedmsa-paper.json", "--set", "rounds=3"),
        *("--set", "evaluate_every=2", "--set", "classes=lesion"),
        *("--set", "backbone=vit_demo", "--set", "image_size=128"),
    )
    assert code == 0
    assert "first after round 1, then after every 2 rounds" in re.sub(r"\s+", " ", out)
    lines = re.findall(r"round (\d): (.*)", out)
    assert [number for number, _ in lines] == ["0", "1", "2", "3"]
    assert ["lesion dice" in text for _, text in lines] == [False, True, False, True]


def test_the_trainer_command_explains_itself_and_refuses_a_mistake(run: Run) -> None:
    code, out, _ = run("trainer", "--help")
    assert code == 0
    assert "--policy" in out
    code, _, err = run("trainer", "--site", "a")
    assert code == 2
    assert "--config" in err


def test_no_command_needs_the_checkout(run: Run, tmp_path: Path) -> None:
    """A job folder may be copied anywhere."""
    shutil.copytree(JOBS / "fedsam", tmp_path / "job")
    write_phantom_site(tmp_path / "site", "noisy", cases=3, slices=1, seed=1)
    code, out, _ = run(
        *("train-local", tmp_path / "job", "--site", tmp_path / "site" / "site.yml"),
        *("--set", "rounds=1", "--set", "batch_size=2", "--set", "local_epochs=1"),
    )
    assert code == 0
    assert "round 1: loss" in out


def test_each_site_alone_is_trained_as_train_local_does_and_scored_at_the_end(
    tmp_path: Path,
) -> None:
    for name in ("site-1", "site-2"):
        write_phantom_site(tmp_path / name, "bright", cases=4, slices=1, validation_fraction=0.5)
    overrides = ["rounds=2", "local_epochs=1", "image_size=64", "holdout=site-2"]
    recipe = read_job_recipe(JOBS / "fedmsa", None, overrides)
    found = each_alone(recipe, find_sites(tmp_path, None), None)
    rounds: list[PooledRound] = []
    site = SiteConfig.from_yaml(tmp_path / "site-1/site.yml")
    tensors = train_pooled(
        recipe.alone, {"s": site}, checkpoints=None, control=Control(), on_round=rounds.append
    )
    dice = next(m.mean for m in rounds[-1].metrics["s"] if m.metric == "dice")

    model = build_model(recipe, find_checkpoint(recipe, None))
    write_travelling(model, tensors)
    other = SiteConfig.from_yaml(tmp_path / "site-2/site.yml")
    cases = prepare_cases(find_cases(other), other)  # all four, the half that would train too
    assert len(cases) == 4
    scores = [score.dice for score in evaluate(model, cases, recipe, other, Control())]
    assert found == {"site-1": {"site-1": dice, "site-2": pytest.approx(np.mean(scores))}}

    own, elsewhere = words({"a": {"a": 0.25, "u": 0.5}, "b": {"b": 0.75, "u": None}})
    assert own.endswith("a 0.250, b 0.750; mean 0.500")
    assert elsewhere == "their models at u, which never trains: a 0.500, b –; mean 0.500"
    assert words({"a": {"a": None}})[0].endswith("a –; mean –")
