"""A run of which the server sees sums only: the same model, and of no site a difference."""

from __future__ import annotations

from pathlib import Path

import pytest
from averaging import federated_average, largest_difference
from federations import JOBS, of_kind, read_records, write_sites

from fedfms.contracts.recipe import Recipe
from fedfms.flare.simulate import simulate
from fedfms.local.sites import find_sites
from fedfms.report.verify import verify_run

pytestmark = pytest.mark.timeout(400)

SITES = ("site-1", "site-2", "site-3")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites that train with unequal numbers of images."""
    return write_sites(tmp_path_factory.mktemp("sites"), SITES)


def test_the_model_is_that_of_the_plain_average_to_the_last_bit(
    sites: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"
    simulate(
        JOBS / "fedmsa",
        find_sites(sites, None),
        overrides=["rounds=2", "batch_size=4", "secure_sum=true"],
        results=results,
        workspace=tmp_path / "workspace",
    )
    recipe = Recipe.from_json(results / "recipe.json")
    expected, slices = federated_average(recipe, sites, SITES)
    assert len(set(slices.values())) == 3
    assert largest_difference(results / "global_model.safetensors", expected) == 0.0
    records = read_records(results)
    for record in of_kind(records, "contribution"):
        assert record["accepted"] and record["contribution"]["update_norm"] is None
    assert [problem for check in verify_run(results) for problem in check.problems] == []
