"""What this project adds to a startup kit of `nvflare provision`.

List `fedfms.flare.kit.FedfmsKitBuilder` under `builders` in project.yml, after FLARE's
StaticFileBuilder. Each kit then gets `local/resources.json` and `local/authorization.json`, which
go before FLARE's own `*.default` files beside them: jobs bring no code, only FLARE's default
classes and ours may be named in a job, and no site streams its log.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Participant, Project
from nvflare.lighter.spec import Builder

# exactly what jobs may name of ours; each is safe to construct with whatever a job says
CLASSES = (
    "fedfms.flare.executor.EvaluationExecutor",
    "fedfms.flare.executor.FedMSAExecutor",
    "fedfms.flare.executor.FedSAMExecutor",
    "fedfms.flare.persistor.SafeTensorsLocator",
    "fedfms.flare.persistor.SafeTensorsPersistor",
    "fedfms.flare.persistor.TravellingModelGenerator",
    "fedfms.flare.presence.Presence",
    "fedfms.flare.recorder.Recorder",
    "fedfms.flare.result_guard.ResultGuard",
)

# a project admin may do everything that runs a federation, and nothing that reads a site's files
_NO_SHELL_NO_CODE = {"shell_commands": "o:site", "byoc": "none", "server-predeployed-flwr": "none"}
_OWN_JOBS = {"manage_job": "n:submitter", "download_job": "n:submitter"}
AUTHORIZATION: dict[str, Any] = {
    "format_version": "1.0",
    "permissions": {
        "project_admin": {
            "submit_job": "any",
            "clone_job": "any",
            "manage_job": "any",
            "download_job": "any",
            "view": "any",
            "operate": "any",
            "get_job_log": "any",
            **_NO_SHELL_NO_CODE,
        },
        "org_admin": {
            "submit_job": "none",
            "clone_job": "none",
            "manage_job": "o:submitter",
            "download_job": "o:submitter",
            "view": "any",
            "operate": "o:site",
            **_NO_SHELL_NO_CODE,
        },
        "lead": {
            "submit_job": "any",
            "clone_job": "n:submitter",
            **_OWN_JOBS,
            "view": "any",
            "operate": "o:site",
            "get_job_log": "n:submitter",
            **_NO_SHELL_NO_CODE,
        },
        "member": {"view": "any"},
    },
}


class FedfmsKitBuilder(Builder):  # type: ignore[misc]
    """Writes the policies of each kit.

    Args:
        server_storage: folder for jobs and their results at the server, absolute there; FLARE's own
            default is below /tmp and goes with the container.
        heart_beat_timeout: seconds without a sign of life after which the server gives a site up.
    """

    def __init__(
        self,
        server_storage: str = "/workspace/storage",
        heart_beat_timeout: int = 120,
        max_jobs: int = 1,
    ) -> None:
        super().__init__()
        self.server_storage = server_storage
        self.heart_beat_timeout = heart_beat_timeout
        self.max_jobs = max_jobs

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        """Write the files; FLARE calls it once for all participants."""
        for participant in [project.get_server(), *project.get_clients()]:
            self._write_policies(participant, Path(ctx.get_local_dir(participant)))

    def _write_policies(self, participant: Participant, local: Path) -> None:
        resources = json.loads((local / "resources.json.default").read_text())
        resources["class_list_enforcement_mode"] = "enforce"
        resources["class_allow_list"] = [*DEFAULT_CLASS_ALLOW_LIST, *CLASSES]
        if participant.type == "server":
            self._set_up_server(resources)
        else:
            resources["allow_log_streaming"] = False
            resources["components"] = _without(resources["components"], "site_log_streamer")
        _write_json(local / "resources.json", resources)
        _write_json(local / "authorization.json", AUTHORIZATION)

    def _set_up_server(self, resources: dict[str, Any]) -> None:
        resources["servers"][0]["heart_beat_timeout"] = self.heart_beat_timeout
        storage = resources["snapshot_persistor"]["args"]["storage"]["args"]
        storage["root_dir"] = f"{self.server_storage}/snapshots"
        resources["components"] = _without(resources["components"], "log_receiver")
        for component in resources["components"]:
            if component["id"] == "job_manager":
                component["args"]["uri_root"] = f"{self.server_storage}/jobs"
            elif component["id"] == "job_scheduler":
                component["args"]["max_jobs"] = self.max_jobs


def _without(components: list[dict[str, Any]], component_id: str) -> list[dict[str, Any]]:
    return [component for component in components if component["id"] != component_id]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
