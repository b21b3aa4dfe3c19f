"""Variables of the environment that FLARE reads: NVFLARE_ and the name of a setting in capitals.

Read in FLARE 2.9.0 (`fuel/utils/config_service.py`). For these settings it is the only place: a
server's resources.json does not hold them, and a job's configuration would let the job decide.
"""

from __future__ import annotations

from collections.abc import Mapping

from nvflare.apis.fl_constant import ConfigVarName
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.fuel.f3.comm_config import VarName
from nvflare.fuel.f3.streaming.byte_streamer import TxTask
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
STREAMS = Assumption(
    "a sender reads window, acknowledgements and retries from settings of these names",
    lambda: uses(
        TxTask.__init__,
        *("get_streaming_window_size", "get_streaming_ack_interval"),
        *("get_streaming_retry_wait", "get_streaming_retry_timeout"),
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


@rests_on(STREAMS)
def stream_settings(megabytes_per_second: float | None) -> Mapping[str, str]:
    """How FLARE sends what is large, as variables for a process that sends: server or site.

    FLARE's own values are for 25 Gbit/s: it has 64 MiB under way, and sends all of it again where
    it is not acknowledged within 5 s, so that a line below some 10 MB/s carries everything several
    times, or nothing at all. Here at most a window is under way, and is waited for three times as
    long as it takes on the line.

    Args:
        megabytes_per_second: that reach the other side, all sites at once; None: not known, and
            0.4 MB/s are assumed. Time there and back limits what is carried to a window each time:
            21 MB/s at 200 ms.
    """
    rate = (megabytes_per_second or 0.4) * 1e6  # bytes a second
    window = _WINDOW_BYTES if rate >= _SLOW else _WINDOW_BYTES // 4
    wait = max(30.0, 3 * window / rate)
    return {
        _variable(VarName.STREAMING_WINDOW_SIZE): f"{window}",
        _variable(VarName.STREAMING_ACK_INTERVAL): f"{window // 4}",
        _variable(VarName.STREAMING_RETRY_WAIT): f"{wait:.0f}",
        _variable(VarName.STREAMING_RETRY_TIMEOUT): f"{20 * wait:.0f}",
    }


_WINDOW_BYTES = 4 * 1024 * 1024
_SLOW = 0.3e6  # bytes a second, below which a window is a quarter


def _variable(name: str) -> str:
    return f"NVFLARE_{name.upper()}"
