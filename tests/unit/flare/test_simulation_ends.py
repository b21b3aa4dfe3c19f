"""When a simulation ends at a site's error: at one that somebody at this machine can mend now."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfms.contracts.recipe import Recipe
from fedfms.errors import FederationError
from fedfms.flare.simulate import Federation
from fedfms.local.sites import find_sites
from fedfms.local.synthetic import write_phantom_site
from fedfms.records.schema import ContributionRecord

JOBS = Path(__file__).resolve().parents[3] / "jobs"


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    write_phantom_site(tmp_path / "sites" / "site-1", "bright", cases=2, slices=1, seed=0)
    recipe = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")
    sites = find_sites(tmp_path / "sites", None)
    return Federation(tmp_path / "run", sites, recipe, None, lambda event: None)


def failed(reason: str, round: int = 0) -> ContributionRecord:
    return ContributionRecord(round=round, site="site-1", accepted=False, reason=reason)


@pytest.mark.parametrize(
    "reason",
    ["SiteDataError (unpaired-files)", "ConfigError (site)", "CheckpointError (checkpoint-hash)"],
)
def test_a_sites_own_files_end_it_in_the_first_round(federation: Federation, reason: str) -> None:
    with pytest.raises(FederationError, match="site-1 cannot take part"):
        federation._stop_for_broken_files(failed(reason))
    federation._stop_for_broken_files(failed(reason, round=1))


@pytest.mark.parametrize("reason", ["SiteDataError (no-room)", "TrainerError (trainer-died)"])
def test_what_may_be_well_in_the_next_round_ends_nothing(
    federation: Federation, reason: str
) -> None:
    federation._stop_for_broken_files(failed(reason))
