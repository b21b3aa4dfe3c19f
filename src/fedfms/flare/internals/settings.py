"""Variables of the environment that FLARE reads: NVFLARE_ and the name of a setting in capitals.

Read in FLARE 2.9.0 (`fuel/utils/config_service.py`). For these settings it is the only place: a
server's resources.json does not hold them, and a job's configuration would let the job decide.
"""

from __future__ import annotations

from collections.abc import Mapping

from nvflare.apis.fl_constant import ConfigVarName
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.fuel.utils.config_service import ConfigService
from nvflare.private.fed.server.job_runner import JobRunner

from fedfms.flare.internals.version import Assumption, rests_on, uses

VARIABLES = Assumption(
    "a setting is read from NVFLARE_NAME, and those of gone sites and of late ends are read so",
    lambda: (
        uses(WFCommServer.initialize_run, "DEAD_CLIENT_GRACE_PERIOD", "get_float_var")
        and uses(JobRunner.__init__, "CLIENT_OUTCOME_WAIT_TIMEOUT", "get_float_var")
        and bool(ConfigVarName.DEAD_CLIENT_CHECK_LEAD_TIME)
        and hasattr(ConfigService, "get_float_var")
    ),
)


@rests_on(VARIABLES)
def gone_site_settings(*, grace: float, lead: float, outcome: float) -> Mapping[str, str]:
    """How soon a server goes on without a site that is gone, as variables for its process.

    Args:
        grace: seconds from the report of a death until a workflow gives the site up.
        lead: seconds that each later round still waits for such a site.
        outcome: seconds that a job's end waits for word from it.
    """
    return {
        _variable(ConfigVarName.CLIENT_OUTCOME_WAIT_TIMEOUT): f"{outcome:g}",
        _variable(ConfigVarName.DEAD_CLIENT_GRACE_PERIOD): f"{grace:g}",
        _variable(ConfigVarName.DEAD_CLIENT_CHECK_LEAD_TIME): f"{lead:g}",
    }


def _variable(name: str) -> str:
    return f"NVFLARE_{name.upper()}"
