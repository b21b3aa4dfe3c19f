"""A small study: killed and started again, both engines, what was opened, what was changed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from federations import JOBS, processes_below, wait_until, write_sites
from strace import TracedProcess, traced, traced_processes

from fedfms.contracts.recipe import Recipe
from fedfms.errors import FederationError
from fedfms.local.sites import find_sites
from fedfms_lab.study.loop import federate
from fedfms_lab.study.record import RUN_FILE, RUNS_FOLDER, read_run
from fedfms_lab.study.verify import Check, verify_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FEDFMS = Path(sys.executable).with_name("fedfms")
FEDERATED = "fedmsa-federated-without-site-3-seed-0"
CENTRAL = "fedmsa-central-without-site-3-seed-0"
NAMES = {FEDERATED, CENTRAL, *(f"fedmsa-local-at-site-{n}-seed-0" for n in (1, 2, 3))}


@dataclass
class Studies:
    """The same study twice."""

    sites: Path
    looped: Path  # engine: loop, killed after its first run, and started again under strace
    flared: Path  # engine: flare, in one go
    trace: Path
    first: dict[str, float]  # runs that were finished before the kill, with their time
    second_start: str  # what the second start printed


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Studies:
    root = tmp_path_factory.mktemp("studies")
    sites = write_sites(root / "sites", ("site-1", "site-2", "site-3"))
    file = root / "question.yml"
    values = {
        "sites": str(sites),
        "methods": {"fedmsa": {"job": str(JOBS / "fedmsa")}},
        "regimes": ["federated", "central", "local"],
        "holdout": ["site-3"],
        "threads": 1,
        "set": {"rounds": 2, "local_epochs": 1, "batch_size": 4},
    }
    file.write_text(yaml.safe_dump(values))
    looped, flared, trace = root / "looped", root / "flared", root / "trace"

    def command(folder: Path, engine: str) -> list[str]:
        return [str(FEDFMS), "study", str(file), "--output", str(folder), "--engine", engine]

    def finished() -> dict[str, float]:
        found = (looped / RUNS_FOLDER).glob(f"*/{RUN_FILE}")
        return {path.parent.name: path.stat().st_mtime for path in found}

    with (root / "first.log").open("wb") as log:
        begun = subprocess.Popen(command(looped, "loop"), stdout=log, stderr=log)
        try:
            wait_until(finished, 200, "the first run is done")
            unfinished = looped / "unfinished"
            wait_until(lambda: any(unfinished.iterdir()), 60, "another run has begun")
        finally:
            begun.send_signal(signal.SIGKILL)
            begun.wait()
    wait_until(lambda: not processes_below(looped), 20, "nothing of the study is left")
    first = finished()
    again = traced(command(looped, "loop"), trace)
    whole = subprocess.run(
        command(flared, "flare"), capture_output=True, text=True, timeout=400, check=False
    )
    assert whole.returncode == 0, whole.stdout + whole.stderr
    return Studies(sites, looped, flared, trace, first, again)


def test_a_killed_study_goes_on_and_repeats_no_finished_run(studies: Studies) -> None:
    folder = studies.looped / RUNS_FOLDER
    assert {path.name for path in folder.iterdir()} == NAMES
    assert 1 <= len(studies.first) < len(NAMES)
    for name, written in studies.first.items():
        assert (folder / name / RUN_FILE).stat().st_mtime == written
    before, now = len(studies.first), len(NAMES) - len(studies.first)
    told = f"5 runs: {before} done before, {now} done now, 0 failed"
    assert told in studies.second_start
    assert not (studies.looped / "unfinished").exists()


def test_both_engines_and_an_interruption_give_the_same_numbers(studies: Studies) -> None:
    for name in NAMES:
        one, other = (folder / RUNS_FOLDER / name for folder in (studies.looped, studies.flared))
        for file in ("model.safetensors", "scores.csv"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), (name, file)
    tables = [
        [line for line in (folder / "study.csv").read_text().splitlines() if ",Dice," in line]
        for folder in (studies.looped, studies.flared)
    ]
    assert tables[0] == tables[1]


def test_rounds_are_the_same_but_for_time_and_memory(studies: Studies) -> None:
    one, other = (
        read_run(folder / RUNS_FOLDER / FEDERATED).rounds
        for folder in (studies.looped, studies.flared)
    )
    for a, b in zip(one, other, strict=True):
        for name in ("round", "site", "role", "loss", "dice", "hd95", "bytes_up", "update_norm"):
            assert getattr(a, name) == getattr(b, name)


def test_every_case_is_scored_that_the_run_did_not_train_on(studies: Studies) -> None:
    """15 cases: 7, 3 and 5; of them 2, 1 and 2 validate."""
    for name, expected in {
        FEDERATED: {("site-1", "train"): 2, ("site-2", "train"): 1, ("site-3", "unseen"): 5},
        CENTRAL: {("site-1", "train"): 2, ("site-2", "train"): 1, ("site-3", "unseen"): 5},
        "fedmsa-local-at-site-2-seed-0": {
            ("site-1", "unseen"): 7,
            ("site-2", "train"): 1,
            ("site-3", "unseen"): 5,
        },
    }.items():
        counts: dict[tuple[str, str], int] = {}
        for row in read_run(studies.looped / RUNS_FOLDER / name).scores:
            counts[row.site, row.role] = counts.get((row.site, row.role), 0) + 1
            assert row.role == "unseen" or row.split == "validation"
        assert counts == expected


def test_the_runs_say_how_many_files_of_each_site_were_opened_to_train(studies: Studies) -> None:
    opened = {name: read_run(studies.looped / RUNS_FOLDER / name).record.opened for name in NAMES}
    assert opened[FEDERATED] == opened[CENTRAL] == {"site-1": 14, "site-2": 6, "site-3": 0}
    assert opened["fedmsa-local-at-site-3-seed-0"] == {"site-1": 0, "site-2": 0, "site-3": 10}
    flared = read_run(studies.flared / RUNS_FOLDER / FEDERATED).record.opened
    assert flared == opened[FEDERATED]


def images_opened(process: TracedProcess, sites: Path) -> set[str]:
    pattern = re.compile(rf'open(?:at2?)?\(.*"{re.escape(str(sites))}/([^/"]+)/.*\.nii')
    return {found[1] for call in process.calls if (found := pattern.search(call))}


def test_no_process_that_trains_ever_opened_an_image_of_a_held_out_site(studies: Studies) -> None:
    """By the kernel's account: strace over the whole second start."""
    seen: dict[str, set[str]] = {}
    for process in traced_processes(studies.trace):
        opened = images_opened(process, studies.sites)
        if '"fedfms_lab.study.process"' in process.program:  # trains, or leads a federation
            run = next(name for name in NAMES if name in process.program)
            trained_on = set(read_run(studies.looped / RUNS_FOLDER / run).record.key.trained_on)
            assert opened == (set() if "federated" in run else trained_on)
            seen[run] = opened
        elif '"fedfms_lab.study.watch"' in process.program:
            site = re.search(r'"--site", "([^"]+)"', process.program)
            assert site is not None and opened == {site[1]}
        elif '"fedfms_lab.study.score"' in process.program:
            assert opened == {"site-1", "site-2", "site-3"}  # the audit sees what is opened
    assert len(seen) >= len(NAMES) - len(studies.first) - 1


# ---------------------------------------------------------------------------------------- verify


def problems(checks: list[Check]) -> str:
    return "\n".join(problem for check in checks for problem in check.problems)


@pytest.fixture
def copy(studies: Studies, tmp_path: Path) -> Path:
    """The study with its sites, to be changed."""
    shutil.copytree(studies.sites, tmp_path / "sites")
    shutil.copytree(studies.looped, tmp_path / "study")
    asked = json.loads((tmp_path / "study" / "study.json").read_text())
    asked["asked"]["sites"] = str(tmp_path / "sites")
    (tmp_path / "study" / "study.json").write_text(json.dumps(asked))
    return tmp_path


@pytest.mark.parametrize("name", [FEDERATED, CENTRAL, "fedmsa-local-at-site-1-seed-0"])
def test_verify_accepts_a_finished_run(copy: Path, name: str) -> None:
    checks = verify_run(copy / "study" / RUNS_FOLDER / name)
    assert problems(checks) == ""
    assert len(checks) == 6


def change_score(run: Path) -> str:
    lines = (run / "scores.csv").read_text().splitlines()
    cells = lines[1].split(",")
    cells[6] = repr(float(cells[6]) - 0.001)
    (run / "scores.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    return f"{cells[0]}, case {cells[3]}, lesion: dice is {cells[6]}"


def change_round(run: Path) -> str:
    text = (run / "rounds.csv").read_text().splitlines()
    cells = text[1].split(",")
    loss = text[0].split(",").index("loss")
    cells[loss] = repr(float(cells[loss]) + 0.001)
    (run / "rounds.csv").write_text("\n".join([text[0], ",".join(cells), *text[2:]]) + "\n")
    return f"rounds.csv, round 0, site-1: loss is {cells[loss]}"


def change_bytes(run: Path) -> str:
    values = json.loads((run / RUN_FILE).read_text())
    values["bytes_up"] -= 1
    (run / RUN_FILE).write_text(json.dumps(values))
    return f"bytes_up is {values['bytes_up']} in run.json"


def change_recipe(run: Path) -> str:
    values = json.loads((run / "recipe.json").read_text())
    values["learning_rate"] = 0.125
    (run / "recipe.json").write_text(json.dumps(values))
    return "learning_rate is 0.125 in recipe.json, and 0.003 in run.json"


def change_image(run: Path) -> str:
    site = run.parents[2] / "sites" / "site-2"
    name = sorted((site / "images").iterdir())[0]
    data = bytearray(name.read_bytes())
    data[-1] ^= 1
    name.write_bytes(data)
    return f"site-2: images/{name.name} was changed after the run"


def remove_label(run: Path) -> str:
    site = run.parents[2] / "sites" / "site-3"
    name = sorted((site / "labels").iterdir())[0]
    name.unlink()
    return name.name


def change_site(run: Path) -> str:
    path = run.parents[2] / "sites" / "site-1" / "site.yml"
    path.write_text(path.read_text() + "keep_empty_every: 2\n")
    return "site-1: site.yml was changed after the run"


def change_model(run: Path) -> str:
    data = bytearray((run / "model.safetensors").read_bytes())
    data[-2] ^= 0x40  # a high bit of the last value
    (run / "model.safetensors").write_bytes(data)
    return "model.safetensors was changed after the run"


SEAL = "run.json as it was written"
RECIPE = "the recipe as it ran"
FILES = "the other files as they were written"
ROUNDS = "rounds.csv and the bytes, from the records"
DATA = "the images, labels and site.yml of each site"
SCORES = "scores.csv, computed again from the model"


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (change_score, {FILES, SCORES}),
        (change_round, {FILES, ROUNDS}),
        (change_bytes, {SEAL, ROUNDS}),
        (change_recipe, {RECIPE, FILES}),
        (change_image, {DATA}),
        (remove_label, {DATA}),
        (change_site, {DATA}),
        (change_model, {FILES, SCORES}),
    ],
)
def test_verify_names_what_was_changed(
    copy: Path, change: Callable[[Path], str], failing: set[str]
) -> None:
    run = copy / "study" / RUNS_FOLDER / FEDERATED
    told = change(run)
    checks = verify_run(run)
    assert told in problems(checks)
    assert {check.what for check in checks if check.problems} == failing


def test_a_study_whose_images_changed_is_not_gone_on_with(copy: Path, studies: Studies) -> None:
    change_image(copy / "study" / RUNS_FOLDER / FEDERATED)
    file = studies.sites.parent / "question.yml"
    done = subprocess.run(
        [str(FEDFMS), "study", str(file), "--output", str(copy / "study"), "--engine", "loop",
         "--sites", str(copy / "sites")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the images, labels or site.yml of site-2 changed" in done.stderr.replace("\n", " ")


# -------------------------------------------------------------------------------------- failures


def test_a_run_that_fails_is_told_with_its_fix_and_done_once_it_can_be(tmp_path: Path) -> None:
    sites = write_sites(tmp_path / "sites", ("site-1", "site-2"))
    file = tmp_path / "question.yml"
    values = {
        "sites": str(sites),
        "methods": {"fedmsa": {"job": str(JOBS / "fedmsa")}},
        "regimes": ["local"],
        "threads": 1,
        "set": {"rounds": 1, "local_epochs": 1},
    }
    file.write_text(yaml.safe_dump(values))
    label = sorted((sites / "site-2" / "labels").iterdir())[0]
    whole = label.read_bytes()
    label.write_bytes(whole[:-20])
    study = tmp_path / "study"

    def run() -> subprocess.CompletedProcess[str]:
        command = [str(FEDFMS), "study", str(file), "--output", str(study), "--only", "site-2"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    failed = run()
    assert failed.returncode == 1
    assert "1 run: 0 done before, 0 done now, 1 failed" in failed.stdout
    assert "fedmsa-local-at-site-2-seed-0" in failed.stderr
    assert "is damaged or cut off" in failed.stderr
    assert "copy the file from its source again" in failed.stderr
    assert not (study / RUNS_FOLDER).exists()
    assert (study / "logs" / "fedmsa-local-at-site-2-seed-0.log").is_file()
    label.write_bytes(whole)
    mended = run()
    assert mended.returncode == 0, mended.stderr
    assert read_run(study / RUNS_FOLDER / "fedmsa-local-at-site-2-seed-0").scores


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"classes": ["tumour"]}, "site-1: the job's class tumour is not in site.yml"),
        ({"backbone": "vit_b"}, "the SAM checkpoint of vit_b"),
    ],
)
def test_what_would_end_every_run_is_refused_before_the_first(
    tmp_path: Path, value: dict[str, object], told: str
) -> None:
    sites = write_sites(tmp_path / "sites", ("site-1", "site-2"))
    methods = {"fedmsa": {"job": str(JOBS / "fedmsa")}}
    (tmp_path / "q.yml").write_text(
        yaml.safe_dump({"sites": str(sites), "methods": methods, "holdout": "none", "set": value})
    )
    done = subprocess.run(
        [str(FEDFMS), "study", str(tmp_path / "q.yml"), "--output", str(tmp_path / "study")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert told in done.stderr and "fix:" in done.stderr
    assert not (tmp_path / "study" / RUNS_FOLDER).exists()


def test_a_site_that_fails_stops_the_others_in_the_middle_of_their_round(tmp_path: Path) -> None:
    sites = write_sites(tmp_path / "sites", ("site-1", "site-2"))
    label = sorted((sites / "site-2" / "labels").iterdir())[0]
    label.write_bytes(label.read_bytes()[:-20])
    recipe = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")
    recipe = recipe.with_overrides(["rounds=1", "local_epochs=2000"])  # many minutes at site-1
    (tmp_path / "result").mkdir()
    started = time.monotonic()
    with pytest.raises(FederationError, match=r"site-2 failed in round 0.*damaged-file"):
        federate(
            recipe,
            find_sites(sites, None),
            job="j",
            folder=tmp_path / "result",
            work=tmp_path / "work",
            checkpoints=None,
            settings=lambda site: {},
            on_round=lambda number: None,
        )
    assert time.monotonic() - started < 120
    assert not processes_below(tmp_path)
