"""Regimes of a study that no federation is needed for: an ensemble, no training, no checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from federations import JOBS, write_sites

from fedfms.exchange.tensors import load_tensors
from fedfms.models.trained import load_trained
from fedfms.models.travelling import read_travelling
from fedfms_lab.study.record import RUNS_FOLDER, read_run
from fedfms_lab.study.score import AtSites
from fedfms_lab.study.verify import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FEDFMS = Path(sys.executable).with_name("fedfms")
ENSEMBLE, ZERO, SCRATCH = (
    "fedmsa-ensemble-all-seed-0",
    "fedmsa-zero-shot-everywhere-seed-0",
    "fedmsa-scratch-all-seed-0",
)
ALONE = [f"fedmsa-local-at-site-{number}-seed-0" for number in (1, 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("regimes")
    values = {
        "sites": str(write_sites(root / "sites", ("site-1", "site-2"))),
        "methods": {"fedmsa": {"job": str(JOBS / "fedmsa")}},
        "regimes": ["ensemble", "local", "zero-shot", "scratch"],
        "holdout": "none",
        "threads": 1,
        "set": {"rounds": 1, "local_epochs": 1, "image_size": 64},
    }
    (root / "question.yml").write_text(yaml.safe_dump(values))
    command = [str(FEDFMS), "study", str(root / "question.yml"), "--output", str(root / "study")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "study" / RUNS_FOLDER


def test_an_ensemble_is_made_of_the_finished_models_of_the_sites(runs: Path) -> None:
    for number, alone in enumerate(ALONE, start=1):
        member = load_tensors(runs / ENSEMBLE / "members" / f"site-{number}.safetensors")
        own = load_tensors(runs / alone / "model.safetensors")
        assert all(torch.equal(member[name], own[name]) for name in own)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        members = [load_trained(runs / alone, None).model(images) for alone in ALONE]
        said = AtSites(runs / ENSEMBLE, None).model(images)
    mean = sum(torch.sigmoid(one) for one in members) / 2
    torch.testing.assert_close(torch.sigmoid(said), mean, rtol=1e-5, atol=2e-6)
    assert {row.split for row in read_run(runs / ENSEMBLE).scores} == {"validation"}


def test_without_training_every_case_is_scored_by_the_network_as_it_begins(runs: Path) -> None:
    run = read_run(runs / ZERO)
    assert {(row.site, row.role) for row in run.scores} == {
        ("site-1", "unseen"),
        ("site-2", "unseen"),
    }
    assert {row.split for row in run.scores} == {"train", "validation"}
    begins = load_trained(runs / ZERO, None).model
    trained = load_trained(runs / ALONE[0], None).model
    first, after = read_travelling(begins), read_travelling(trained)
    assert any(not torch.equal(first[name], after[name]) for name in first)
    assert sum(run.record.opened.values()) == 0  # no process trained


def test_from_scratch_nothing_is_of_the_checkpoint(runs: Path) -> None:
    own, of_sam = (
        dict(load_trained(runs / name, None).model.named_parameters()) for name in (SCRATCH, ZERO)
    )
    frozen = [name for name, tensor in of_sam.items() if not tensor.requires_grad]
    weights = [name for name in frozen if of_sam[name].dim() > 1 and bool(of_sam[name].any())]
    assert weights and not any(torch.equal(own[name], of_sam[name]) for name in weights)


@pytest.mark.parametrize("name", [ENSEMBLE, ZERO, SCRATCH])
def test_what_such_runs_claim_is_verified_again(runs: Path, name: str) -> None:
    assert [check.problems for check in verify_run(runs / name)] == [()] * 6
    kept = json.loads((runs / name / "run.json").read_text())
    assert kept["key"]["regime"] in name
