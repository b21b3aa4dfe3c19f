"""Variables of the environment that FLARE reads: NVFLARE_ and the name of a setting in capitals.

Read in FLARE 2.9.0 (`fuel/utils/config_service.py`). For these settings it is the only place: a
server's resources.json does not hold them, and a job's configuration would let the job decide.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvflare.apis.fl_constant import ConfigVarName
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.fuel.f3.comm_config import CommConfigurator, VarName
from nvflare.fuel.f3.drivers.grpc_driver import GRPC_DEFAULT_OPTIONS, GrpcDriver
from nvflare.fuel.f3.streaming.byte_receiver import RxTask
from nvflare.fuel.f3.streaming.byte_streamer import ByteStreamer, TxTask
from nvflare.fuel.utils.config_service import ConfigService
from nvflare.fuel.utils.fobs.decomposers.via_downloader import ViaDownloaderDecomposer
from nvflare.private.fed.client.client_runner import ClientRunner
from nvflare.private.fed.server.job_runner import JobRunner

from fedfms.contracts.machine import UNTOLD_MEGABYTES_PER_SECOND, Machine
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
    "a sender reads pieces, window, acknowledgements and retries from settings of these names, and "
    "a receiver how long it waits",
    lambda: (
        uses(
            TxTask.__init__,
            *("get_streaming_window_size", "get_streaming_ack_interval", "get_streaming_ack_wait"),
            *("get_streaming_retry_wait", "get_streaming_retry_timeout"),
            "get_streaming_ack_progress_timeout",
        )
        and uses(ByteStreamer.__init__, "get_streaming_chunk_size")
        and uses(RxTask.__init__, "get_streaming_read_timeout")
    ),
)
DOWNLOADS = Assumption(
    "tensors are asked for in chunks, with settings of these names",
    lambda: (
        uses(ViaDownloaderDecomposer._create_downloadable, "DOWNLOAD_CHUNK_SIZE")
        and uses(ViaDownloaderDecomposer._create_downloader, "MIN_DOWNLOAD_TIMEOUT")
        and uses(
            ViaDownloaderDecomposer._download_from_remote_cell, "STREAMING_PER_REQUEST_TIMEOUT"
        )
        and uses(ClientRunner.__init__, "GET_TASK_TIMEOUT", "SUBMIT_TASK_RESULT_TIMEOUT")
    ),
)
RESENDS = Assumption(
    "a stream is sent again until it is acknowledged where streaming_reliable says so, and a value "
    "once read stays in ConfigService._var_values",
    lambda: (
        uses(TxTask.__init__, "get_streaming_reliable")
        and uses(ConfigService._any_var, "_var_values")
        and isinstance(ConfigService._var_values, dict)
    ),
)
CONNECTIONS = Assumption(
    "a gRPC connection is made with the options that local/comm_config.json has under grpc",
    lambda: (
        uses(GrpcDriver.__init__, "options", "max_workers", "get_config")
        and uses(CommConfigurator.__init__, "load_configuration")
        and [name for name, _ in GRPC_DEFAULT_OPTIONS]
        == ["grpc.max_send_message_length", "grpc.max_receive_message_length"]
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


@dataclass(frozen=True, slots=True)
class Line:
    """What follows from what a line carries; the one place of the formula.

    FLARE's own values are for 25 Gbit/s: it has 64 MiB under way, and sends all of it again where
    it is not acknowledged within 5 s, so that a line below some 10 MB/s carries everything several
    times, or nothing at all. Here at most `under_way` is, and is waited for three times as long as
    it takes on the line: twice is what it takes where all of it was sent again once, and a line
    that was only late is not filled with the same bytes for ever.

    Args:
        megabytes_per_second: that reach the other side, all sites at once; None: not known, and
            0.4 MB/s are assumed. Time there and back limits what is carried to a window each time:
            21 MB/s at 200 ms, and 84 MB/s where the line is said to be fast.
    """

    megabytes_per_second: float | None

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return (self.megabytes_per_second or UNTOLD_MEGABYTES_PER_SECOND) * 1e6

    @property
    def window(self) -> int:
        """Bytes that are sent without an acknowledgement; of tensors asked for at once, too."""
        if self.rate < _SLOW:
            return _WINDOW_BYTES // 4
        return 4 * _WINDOW_BYTES if self.rate >= _FAST else _WINDOW_BYTES

    @property
    def under_way(self) -> int:
        """Bytes: FLARE looks at its window before it sends one more piece."""
        return self.window + self.window // 4

    @property
    def wait(self) -> float:
        """Seconds after which what was not acknowledged is sent again."""
        return max(30.0, 3 * self.under_way / self.rate)

    @property
    def silence(self) -> float:
        """Seconds without a byte, after which a receiver asks anew for the chunk it waits for."""
        return 2 * self.wait + 10.0

    @property
    def patience(self) -> float:
        """Seconds for a break to end, in which nothing is given up."""
        return 20 * self.wait


@rests_on(STREAMS, DOWNLOADS)
def stream_settings(megabytes_per_second: float | None) -> Mapping[str, str]:
    """How FLARE sends what is large, as variables for server or site and their job processes.

    Args:
        megabytes_per_second: see `Line`.
    """
    line = Line(megabytes_per_second)
    values = {
        VarName.STREAMING_CHUNK_SIZE: line.window // 4,
        VarName.STREAMING_WINDOW_SIZE: line.window,
        VarName.STREAMING_ACK_INTERVAL: line.window // 4,
        VarName.STREAMING_RETRY_WAIT: line.wait,
        VarName.STREAMING_RETRY_TIMEOUT: line.patience,
        VarName.STREAMING_ACK_WAIT: line.patience,
        VarName.STREAMING_ACK_PROGRESS_TIMEOUT: line.patience,
        VarName.STREAMING_READ_TIMEOUT: line.silence,
        # a chunk is whole tensors, so never less than the largest one
        f"tensor_{ConfigVarName.DOWNLOAD_CHUNK_SIZE}": line.window,
        f"tensor_{ConfigVarName.MIN_DOWNLOAD_TIMEOUT}": line.patience,
        f"tensor_{ConfigVarName.STREAMING_PER_REQUEST_TIMEOUT}": line.patience,
        ConfigVarName.GET_TASK_TIMEOUT: line.patience,
        # the answer to it comes when all tensors are there
        ConfigVarName.SUBMIT_TASK_RESULT_TIMEOUT: max(3600.0, 5 * _LARGEST_BYTES / line.rate),
    }
    return {_variable(name): f"{value:.0f}" for name, value in values.items()}


def set_stream_settings() -> None:
    """Set them for this process and its children, by LINK_MB_PER_SECOND; what is set stays."""
    link = Machine.from_environment().link_megabytes_per_second
    os.environ.update({**stream_settings(link), **os.environ})


@rests_on(CONNECTIONS)
def write_connection_settings(local: Path, megabytes_per_second: float | None) -> None:
    """Let connections be noticed that a network forgot, as a firewall does when it starts anew.

    Nothing comes over such a connection any more, not even its end, and FLARE sends into it for
    ever. Here each side asks after half a minute without a byte, and without an answer connects
    again. Both sides need the same: a gRPC server ends connections that ask more often than it
    allows.

    Args:
        local: of the FLARE workspace of a server or a site.
        megabytes_per_second: see `Line`: an answer waits behind what is under way.
    """
    line = Line(megabytes_per_second)
    options = [
        *GRPC_DEFAULT_OPTIONS,
        ("grpc.keepalive_time_ms", round(1e3 * _ASK_SECONDS)),
        ("grpc.keepalive_timeout_ms", round(1e3 * line.wait)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", round(1e3 * _ASK_SECONDS / 3)),
    ]
    content = {"grpc": {"options": options}}
    (local / "comm_config.json").write_text(json.dumps(content, indent=2) + "\n")


@rests_on(RESENDS)
def resend_requests() -> None:
    """Let this process send each of its requests until the other side has acknowledged it.

    For job processes, which ask for nothing but their own job: FLARE sends answers so, but not
    requests, and a site whose question was lost in a break waits for the answer until its time-out.
    The parents' requests, such as a command to end a job, must not arrive long after they were
    given up.
    """
    ConfigService._var_values[VarName.STREAMING_RELIABLE] = True


_WINDOW_BYTES = 4 * 1024 * 1024
_SLOW = 0.3e6  # bytes a second, below which a window is a quarter
_FAST = 20e6  # from which it is four times as large: fewer, larger pieces cost less processor time
_LARGEST_BYTES = 400_000_000  # that travel: FedSAM, ViT-B, fp32
_ASK_SECONDS = 30.0


def _variable(name: str) -> str:
    return f"NVFLARE_{name.upper()}"
