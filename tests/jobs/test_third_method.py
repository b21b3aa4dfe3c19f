"""A method that did not exist when kits were made and processes started."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from averaging import federated_average, largest_difference
from federations import JOBS, of_kind, read_records, write_sites
from safetensors.torch import load_file

from distributions import install, make_environment
from fedfms import models
from fedfms.errors import ConfigError
from fedfms.flare.lint import check_announcements
from fedfms.flare.session import prepare_job
from fedfms.flare.simulate import Federation
from fedfms.local.sites import find_sites

AGREED = ("site-1", "site-2")


def job_of_the_third_method(folder: Path) -> Path:
    """jobs/fedmsa, but for the executor's name and the recipe's method."""
    shutil.copytree(JOBS / "fedmsa", folder)
    client = folder / "app/config/config_fed_client.json"
    text = client.read_text()
    assert text.count("fedfms.flare.executor.FedMSAExecutor") == 1
    client.write_text(text.replace(".FedMSAExecutor", ".TrainingExecutor"))
    recipe = folder / "app/config/recipe.json"
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "method": "decoder"}))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_third_method_trains_in_kits_that_were_made_before_it_where_sites_agreed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = write_sites(tmp_path / "sites", (*AGREED, "site-3"))
    for name in AGREED:
        policy = sites / name / "policy" / "privacy.json"
        allowed = {**json.loads(policy.read_text()), "methods": ["fedsam", "fedmsa", "decoder"]}
        policy.write_text(json.dumps(allowed))
    job = prepare_job(
        job_of_the_third_method(tmp_path / "decoder"), tmp_path / "prepared", ["rounds=2"]
    )
    python, packages = make_environment(tmp_path / "environment")
    monkeypatch.setattr(sys, "executable", str(python))  # every process of the federation runs it

    federation = Federation(tmp_path / "run", find_sites(sites, None), job.recipe, None, print)
    with federation.running() as coordinator:
        install(Path(__file__).parent / "third_method", packages, tmp_path)
        job_id = federation.submit(coordinator, job.folder)
        assert federation.wait_for_end(coordinator, job_id) == "FINISHED:COMPLETED"
        told = {one.site: one for one in coordinator.announcements()}
        results = coordinator.download(job_id, tmp_path / "download")

    # those that agreed say so, in a name that nobody's package knew; the third is found before
    assert all(told[name].methods == ("fedsam", "fedmsa", "decoder") for name in AGREED)
    with pytest.raises(ConfigError) as caught:
        check_announcements(job, sorted(told.values(), key=lambda s: s.site))
    assert (
        caught.value.problem
        == "site-3 does not allow decoder: its policy says fedsam, fedmsa, lora"
    )

    # whoever submits all the same: the site itself refuses, in each round, by its own sentence
    records = read_records(results)
    rounds = of_kind(records, "round_done")
    assert [record["sites"] for record in rounds] == [[*AGREED]] * 2
    assert all("DoorClosed (method-not-allowed)" in r["missed"]["site-3"] for r in rounds)
    said = (federation.run / "sites" / "site-3" / "errors.log").read_text()
    assert "the site's policy allows fedsam and fedmsa and lora, not decoder" in said
    assert "add decoder to methods in privacy.json, if the site agrees to such jobs" in said

    # exactly the decoder's tensors that a loss reaches, by SAM's own names; and what they are worth
    sam = load_file(Path(models.__file__).parent / "vit_demo.safetensors")
    unused = ("iou_prediction_head.", *(f"output_hypernetworks_mlps.{i}." for i in (1, 2, 3)))
    decoder = {name for name in sam if name.startswith("mask_decoder.")}
    travelled = load_file(results / "global_model.safetensors")
    assert set(travelled) == {
        name for name in decoder if not name.removeprefix("mask_decoder.").startswith(unused)
    }
    monkeypatch.syspath_prepend(str(packages))
    expected, _ = federated_average(job.recipe, sites, AGREED)
    assert largest_difference(results / "global_model.safetensors", expected) == 0.0
