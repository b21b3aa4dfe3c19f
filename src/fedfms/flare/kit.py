"""What this project adds to a startup kit of `nvflare provision`.

List `fedfms.flare.kit.FedfmsKitBuilder` under `builders` in project.yml, after FLARE's
StaticFileBuilder, and `fedfms.flare.kit.FedfmsCertBuilder` in the place of FLARE's CertBuilder.
Each kit then gets `local/resources.json` and `local/authorization.json`, which go before FLARE's
own `*.default` files beside them: jobs bring no code, only FLARE's default classes and ours may be
named in a job, and no site streams its log. `fedfms.json` says whose kit it is; `SHA256SUMS` lists
its files and is signed by the project's certificate authority, since FLARE signs no startup kit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nvflare
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.lighter.constants import CtxKey, PropKey
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Participant, Project
from nvflare.lighter.spec import Builder

from fedfms import __version__
from fedfms.flare.feed import RIGHT
from fedfms.flare.internals import kit as internals
from fedfms.flare.turned import COMPONENT as TURNED_KIT
from fedfms.kits.about import KitAbout
from fedfms.kits.checksums import write_sums

# exactly what jobs may name of ours; each is safe to construct with whatever a job says
CLASSES = (
    "fedfms.flare.aggregator.OrderedAggregator",
    "fedfms.flare.executor.EvaluationExecutor",
    "fedfms.flare.executor.FedMSAExecutor",
    "fedfms.flare.executor.FedSAMExecutor",
    "fedfms.flare.executor.TrainingExecutor",  # of whatever method: a new one needs no new kit
    "fedfms.flare.persistor.SafeTensorsLocator",
    "fedfms.flare.persistor.SafeTensorsPersistor",
    "fedfms.flare.persistor.TravellingModelGenerator",
    "fedfms.flare.presence.Presence",
    "fedfms.flare.recorder.Recorder",
    "fedfms.flare.result_guard.ResultGuard",
    "fedfms.flare.selector.BestModelSelector",
)

# a project admin may do everything that runs a federation, and nothing that reads a site's files
_NO_SHELL_NO_CODE = {"shell_commands": "o:site", "byoc": "none", "server-predeployed-flwr": "none"}
# what a running job tells who may look: its records, of which the event is a summary (feed.py)
_LOOK = {"view": "any", RIGHT: "any"}
_OWN_JOBS = {"manage_job": "n:submitter", "download_job": "n:submitter"}
# report_resources is what a site announces of itself (flare/announce.py). FLARE counts it as
# operating a site; here everybody who may look sees it, since a job is checked against it.
AUTHORIZATION: dict[str, Any] = {
    "format_version": "1.0",
    "permissions": {
        "project_admin": {
            "submit_job": "any",
            "clone_job": "any",
            "manage_job": "any",
            "download_job": "any",
            **_LOOK,
            "operate": "any",
            "get_job_log": "any",
            **_NO_SHELL_NO_CODE,
        },
        "org_admin": {
            "submit_job": "none",
            "clone_job": "none",
            "manage_job": "o:submitter",
            "download_job": "o:submitter",
            **_LOOK,
            "operate": "o:site",
            "report_resources": "any",
            **_NO_SHELL_NO_CODE,
        },
        "lead": {
            "submit_job": "any",
            "clone_job": "n:submitter",
            **_OWN_JOBS,
            **_LOOK,
            "operate": "o:site",
            "report_resources": "any",
            "get_job_log": "n:submitter",
            **_NO_SHELL_NO_CODE,
        },
        "member": {**_LOOK, "report_resources": "any"},
    },
}

# a site answers no app command, and its own file needs no line for it
SITE_AUTHORIZATION: dict[str, Any] = {
    **AUTHORIZATION,
    "permissions": {
        role: {right: who for right, who in rights.items() if right != RIGHT}
        for role, rights in AUTHORIZATION["permissions"].items()
    },
}


class FedfmsKitBuilder(Builder):  # type: ignore[misc]
    """Writes the policies of each kit, what the kit says of itself, and its signed checksums.

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
        server = project.get_server()
        for participant in project.get_all_participants():
            KitAbout(
                project=project.name,
                participant=participant.name,
                type=participant.type,
                server_host=server.get_default_host(),
                server_port=ctx[CtxKey.FED_LEARN_PORT],
                version=__version__,
                nvflare=nvflare.__version__,
            ).write(Path(ctx.get_ws_dir(participant)))

    def finalize(self, project: Project, ctx: ProvisionContext) -> None:
        """Write the checksums; FLARE finalizes in reverse order, so the certificates are there."""
        for participant in project.get_all_participants():
            if participant.get_prop(PropKey.COMM_CONFIG_ARGS):  # FLARE writes it after this
                raise ValueError(
                    f"{participant.name} has a connection of its own (listening_host or "
                    "connect_to), which these kits do not have"
                )
            write_sums(Path(ctx.get_ws_dir(participant)), ctx[CtxKey.ROOT_PRI_KEY])

    def _write_policies(self, participant: Participant, local: Path) -> None:
        resources = internals.read_default_resources(local)
        fallback = {**resources, "components": [*resources["components"], TURNED_KIT]}
        internals.write_resources(local, internals.DEFAULT_RESOURCES, fallback)
        resources["class_list_enforcement_mode"] = "enforce"
        resources["class_allow_list"] = [*DEFAULT_CLASS_ALLOW_LIST, *CLASSES]
        if participant.type == "server":
            internals.set_up_server(
                resources,
                storage=self.server_storage,
                heart_beat_timeout=self.heart_beat_timeout,
                max_jobs=self.max_jobs,
                job_manager="fedfms.flare.keeper.RunJobManager",
                components=[
                    {"id": "greeting", "path": "fedfms.flare.greeting.Greeting", "args": {}},
                    {"id": "keeper", "path": "fedfms.flare.keeper.JobKeeper", "args": {}},
                    {"id": "metrics", "path": "fedfms.flare.metrics.Metrics", "args": {}},
                ],
            )
        else:
            internals.set_up_site(resources, "fedfms.flare.announce.SiteResources")
        internals.write_resources(local, internals.RESOURCES, resources)
        is_server = participant.type == "server"
        rights = AUTHORIZATION if is_server else SITE_AUTHORIZATION
        internals.write_resources(local, "authorization.json", rights)


FedfmsCertBuilder = internals.OwnKeyCertBuilder  # as project.yml names it
