"""A canary before a run: every site's fault in one go, and a run after it as if it had not been."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import yaml
from federations import JOBS, STYLES, write_sites

from fedfms.files import file_sha256
from fedfms.flare.run_state import RUNS
from fedfms.flare.session import Coordinator, prepare_job
from fedfms.flare.simulate import ADMIN, SERVER, Federation
from fedfms.local.sites import Site, find_sites
from fedfms.trainer.ledger import PAGE

pytestmark = pytest.mark.timeout(900)

HELPERS = Path(__file__).resolve().parent
BACKBONE = HELPERS.parents[1] / "src/fedfms/models/vit_demo.safetensors"
SMALL = ("image_size=64", "rounds=2", "local_epochs=3")


class UnlikeSites(Federation):
    """Each site has checkpoints of its own."""

    folders: Mapping[str, Path]

    def trainer_command(self, site: Site, exchange: Path) -> list[str]:
        command = super().trainer_command(site, exchange)
        at = command.index("--checkpoints") + 1
        return [*command[:at], str(self.folders[site.name]), *command[at + 1 :]]


@dataclass
class Place:
    root: Path
    federation: Federation
    coordinator: Coordinator

    def fedfms(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("fedfms")), *arguments]
        kit = str(self.federation.kit(ADMIN))
        return subprocess.run(
            [*command, "--kit", kit], cwd=self.root, capture_output=True, text=True, timeout=600
        )


def other_backbone(folder: Path) -> str:
    """A checkpoint that only those have whom it was given; its SHA-256."""
    folder.mkdir()
    tensors = safetensors.torch.load_file(BACKBONE)
    first = sorted(tensors)[0]
    tensors[first] = tensors[first] + 1e-3
    safetensors.torch.save_file(tensors, folder / "ours.safetensors")
    return file_sha256(folder / "ours.safetensors")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Place, str]]:
    """A wrong label map, a missing checkpoint, too little memory: one at each of three sites."""
    root = tmp_path_factory.mktemp("faulty")
    sha256 = other_backbone(root / "checkpoints")
    (root / "none").mkdir()
    sites = find_sites(write_sites(root / "sites", STYLES), None)
    settings = yaml.safe_load((sites[0].folder / "site.yml").read_text())
    (sites[0].folder / "site.yml").write_text(
        yaml.safe_dump({**settings, "classes": {"lesion": [7]}})
    )
    sites[2] = Site(sites[2].name, sites[2].folder, sites[2].data, trainer="small_trainer")
    job = prepare_job(JOBS / "fedmsa", root / "job" / "fedmsa", [f"backbone_sha256={sha256}"])
    checkpoints = root / "checkpoints"
    federation = UnlikeSites(
        root / "run",
        sites,
        job.recipe,
        checkpoints,
        lambda event: None,
        settings=lambda site: {"PYTHONPATH": str(HELPERS)},
    )
    federation.folders = {"site-1": checkpoints, "site-2": root / "none", "site-3": checkpoints}
    with federation.running() as coordinator:
        yield Place(root, federation, coordinator), sha256


def test_three_sites_faults_are_found_in_one_go_before_the_run(faulty: tuple[Place, str]) -> None:
    place, sha256 = faulty
    began = time.monotonic()
    said = place.fedfms(
        *("submit", str(JOBS / "fedmsa"), "--canary", "--set", f"backbone_sha256={sha256}"),
        *("--wait-for", "3", "--set", "image_size=512", "--set", "batch_size=8"),
    )
    seconds = time.monotonic() - began
    print(said.stdout, said.stderr, f"{seconds:.0f} s")
    assert said.returncode == 1
    lines = {
        site: line
        for line in said.stderr.splitlines()
        for site in STYLES
        if line.strip().startswith(f"- {site}:")
    }
    assert "values that its site.yml does not know" in lines["site-1"]
    assert "check-data" in lines["site-1"]
    assert "checkpoint is not the one" in lines["site-2"] and sha256[:12] in lines["site-2"]
    assert "memory" in lines["site-3"] and "TRAINER_MEMORY" in lines["site-3"]
    assert "(out-of-memory)" in lines["site-3"]  # said, and not killed for it
    assert seconds < 180
    assert place.coordinator.jobs() == []


def test_the_same_in_json(faulty: tuple[Place, str]) -> None:
    """Without the site with little memory, which is the slow one."""
    place, sha256 = faulty
    said = place.fedfms(
        *("submit", str(JOBS / "fedmsa"), "--canary-only", "--json", "--without", "site-3"),
        *("--set", f"backbone_sha256={sha256}", "--set", "image_size=64"),
    )
    assert said.returncode == 1
    troubles = json.loads(said.stdout)["canary"]["troubles"]
    codes = {one["site"]: one["code"] for one in troubles}
    assert codes == {"site-1": "unknown-label-values", "site-2": "wrong-checkpoint"}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("healthy")
    sites = find_sites(write_sites(root / "sites", STYLES), None)
    job = prepare_job(JOBS / "fedmsa", root / "job" / "fedmsa", SMALL)
    federation = Federation(root / "run", sites, job.recipe, None, lambda event: None)
    with federation.running() as coordinator:
        yield Place(root, federation, coordinator)


@pytest.fixture(scope="module")
def results(healthy: Place) -> tuple[Path, Path, dict]:
    """Of a run without a canary and of one after it, and what the canary said."""
    overrides = [word for setting in SMALL for word in ("--set", setting)]
    folders = healthy.root / "plain", healthy.root / "rehearsed"
    job = ("submit", str(JOBS / "fedmsa"), "--wait-for", "3", *overrides)
    plain = healthy.fedfms(*job, "--watch", "--results", str(folders[0]))
    assert plain.returncode == 0, plain.stderr
    for site in STYLES:  # as at sites that are new
        shutil.rmtree(healthy.federation.run / "sites" / site / "prepared")
    alone = healthy.fedfms(*job, "--canary-only", "--json")
    assert alone.returncode == 0, alone.stderr
    rehearsed = healthy.fedfms(*job, "--canary", "--watch", "--results", str(folders[1]))
    print(rehearsed.stdout, rehearsed.stderr)
    assert rehearsed.returncode == 0, rehearsed.stderr
    assert "a round will take about" in rehearsed.stdout
    return *folders, json.loads(alone.stdout)["canary"]


def test_the_run_after_a_canary_is_the_run_without_it(results: tuple[Path, Path, dict]) -> None:
    plain, rehearsed, _ = results
    for name in ("global_model.safetensors", "best_model.safetensors", "recipe.json"):
        assert (plain / name).read_bytes() == (rehearsed / name).read_bytes(), name


def test_every_sites_pace_is_told(results: tuple[Path, Path, dict]) -> None:
    said = results[2]
    assert set(said["sites"]) == set(STYLES) and said["troubles"] == []
    for pace in said["sites"].values():
        assert pace["seconds_per_round"] > pace["seconds_per_step"] > 0
        assert pace["peak_memory_bytes"] > 100 * 1024**2


def test_nothing_of_a_canary_stays_and_the_audits_show_it(
    healthy: Place, results: tuple[Path, Path, dict]
) -> None:
    jobs = {one.job_id for one in healthy.coordinator.jobs()}
    assert len(jobs) == 2  # the two runs
    server = healthy.federation.kit(SERVER)
    assert {path.name for path in (server / RUNS).glob("*")} <= jobs
    assert {path.name for path in server.glob("*-*-*-*-*")} <= jobs
    assert {path.name for path in (server.parent / "storage").rglob("*-*-*-*-*")} <= jobs
    for site in STYLES:
        work = healthy.federation.run / "sites" / site
        assert {path.name for path in (work / "runs").iterdir()} == jobs
        assert {path.stem for path in (work / "scores").iterdir()} == jobs
        trainer = (healthy.federation.logs / f"{site}.trainer.log").read_text()
        assert trainer.count("a canary (train): zeros leave") == 2
        audits = healthy.federation.kit(site).glob("*-*-*-*-*/audit.log")
        told = {path.parent.name for path in audits if "zeros leave" in path.read_text()}
        assert len(told) == 2 and not told & jobs
        assert not list(healthy.federation.kit(site).rglob("*.safetensors"))
        assert (work / PAGE).read_text().count("a canary: train round 1 of 1") == 2


def test_a_recipe_that_says_canary_is_no_run(healthy: Place) -> None:
    said = healthy.fedfms("submit", str(JOBS / "fedmsa"), "--set", "canary=true")
    assert said.returncode == 1
    assert "submit with --canary" in said.stderr
