"""What FLARE's provisioner writes into a kit, and what is changed in it.

Read in FLARE 2.9.0 (`lighter/impl/`, `lighter/templates/`). Builders are public API; the content of
`resources.json.default` is not, and FLARE's CertBuilder makes a private key for everybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.workspace import Workspace
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Participant
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.provisioner import Provisioner

from fedfms.bounded import read_json_object
from fedfms.flare.internals.version import Assumption, rests_on, takes, uses

DEFAULT_RESOURCES, RESOURCES = "resources.json.default", "resources.json"

RESOURCE_FILES = Assumption(
    "a workspace's local/resources.json goes before resources.json.default, which is read only "
    "where the first is not there",
    lambda: uses(Workspace.get_resources_file_path, "RESOURCES_CONFIG", "DEFAULT_RESOURCES_CONFIG"),
)
FINALIZE = Assumption(
    "the provisioner builds in the order of the builders and finalizes in the reverse order",
    lambda: uses(Provisioner._build, "builders", "build", "finalize"),
)
CERTIFICATES = Assumption(
    "CertBuilder writes a participant's certificate and key in _build_write_cert_pair(participant, "
    "base_name, ctx), of its persistent_state and serialized_cert",
    lambda: (
        takes(CertBuilder._build_write_cert_pair, "participant", "base_name", "ctx")
        and uses(CertBuilder._build_write_cert_pair, "persistent_state", "get_subject_cert")
        and uses(CertBuilder.__init__, "persistent_state", "serialized_cert")
    ),
)


@rests_on(RESOURCE_FILES)
def read_default_resources(local: Path) -> dict[str, Any]:
    """What FLARE wrote for a participant, before anything of ours."""
    return read_json_object(local / DEFAULT_RESOURCES)


def write_resources(local: Path, name: str, values: Mapping[str, Any]) -> None:
    """Write one of the two files."""
    (local / name).write_text(json.dumps(values, indent=2) + "\n")


def set_up_server(
    resources: dict[str, Any],
    *,
    storage: str,
    heart_beat_timeout: int,
    max_jobs: int,
    job_manager: str,
    components: Iterable[Mapping[str, Any]],
) -> None:
    """Change a server's resources: where jobs are, when a site counts as gone, no log of sites.

    FLARE's builders have no arguments for these.

    Args:
        storage: folder for jobs and their results; FLARE's is below /tmp.
        job_manager: path of a class in the place of FLARE's.
        components: to add.
    """
    resources["servers"][0]["heart_beat_timeout"] = heart_beat_timeout
    resources["servers"][0]["check_engine_frequency"] = _LOOK_SECONDS
    snapshots = resources["snapshot_persistor"]["args"]["storage"]["args"]
    snapshots["root_dir"] = f"{storage}/snapshots"
    resources["components"] = _without(resources["components"], "log_receiver")
    manager = component(resources, "job_manager")
    manager["path"] = job_manager
    manager["args"]["uri_root"] = f"{storage}/jobs"
    component(resources, "job_scheduler")["args"]["max_jobs"] = max_jobs
    resources["components"] += [dict(one) for one in components]


def set_up_site(resources: dict[str, Any], resource_manager: str) -> None:
    """Change a site's resources: no log leaves it, and another resource manager.

    Args:
        resource_manager: path of its class.
    """
    resources["allow_log_streaming"] = False
    resources["components"] = _without(resources["components"], "site_log_streamer")
    component(resources, "resource_manager").update(path=resource_manager, args={})


def component(resources: Mapping[str, Any], component_id: str) -> dict[str, Any]:
    """One component by its id.

    Raises:
        ValueError: FLARE wrote none of that id; its provisioner then says so.
    """
    for one in resources["components"]:
        if one["id"] == component_id:
            found: dict[str, Any] = one
            return found
    raise ValueError(f"FLARE wrote no component {component_id} into {DEFAULT_RESOURCES}")


def _without(components: list[dict[str, Any]], component_id: str) -> list[dict[str, Any]]:
    return [one for one in components if one["id"] != component_id]


_LOOK_SECONDS = 0.5  # FLARE's is 3: so late a job's process sees that its job is over

OWN_KEY = "own_key"  # in project.yml: this site makes its own key


class OwnKeyCertBuilder(CertBuilder):  # type: ignore[misc]
    """FLARE's CertBuilder, but for sites that make their own key.

    Their kit has the certificate that was approved (`fedfms approve`; state.py), if there is one
    yet, and no private key; none is made for them here. FLARE's own way for them, `nvflare
    package`, makes kits of another kind.

    Args:
        root_valid_days: how long a new certificate authority is valid; participants' certificates
            are valid for 360 days and can be renewed under it.
    """

    @rests_on(CERTIFICATES)
    def __init__(self, root_valid_days: int = 3650) -> None:
        super().__init__(root_valid_days)

    def _build_write_cert_pair(
        self, participant: Participant, base_name: str, ctx: ProvisionContext
    ) -> None:
        if not participant.get_prop(OWN_KEY):
            super()._build_write_cert_pair(participant, base_name, ctx)
            return
        startup = Path(ctx.get_kit_dir(participant))
        (startup / "rootCA.pem").write_bytes(self.serialized_cert)
        certificate = self.persistent_state.get_subject_cert(participant.subject)
        if certificate is not None:
            (startup / f"{base_name}.crt").write_text(certificate)
