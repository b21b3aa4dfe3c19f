"""A running FLARE client at a site: what its server asks it to remove.

Read in FLARE 2.9.0 (`private/fed/client/`). A component hears nothing of an admin's requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from nvflare.private.admin_defs import Message, ok_reply
from nvflare.private.defs import RequestHeader, TrainingTopic
from nvflare.private.fed.client.client_engine import ClientEngine
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.training_cmds import DeleteRunNumberProcessor

from fedfms.flare.internals.version import Assumption, rests_on, takes, uses

log = logging.getLogger(__name__)

REMOVALS = Assumption(
    "ClientRequestProcessors.request_processors lists what answers a server's DELETE_RUN, and is "
    "read once the client is registered; a client knows its jobs by get_all_job_ids()",
    lambda: (
        [TrainingTopic.DELETE_RUN]
        in [one.get_topics() for one in ClientRequestProcessors.request_processors]
        and uses(DeleteRunNumberProcessor.process, "JOB_ID", "delete_run")
        and takes(ClientEngine.get_all_job_ids)
    ),
)


@rests_on(REMOVALS)
def hear_removals(remove: Callable[[str], str]) -> None:
    """Be told of a job that the server has removed; to be called before the client registers.

    Args:
        remove: gets a job that does not run here; its answer goes to the server.
    """

    class Removals(DeleteRunNumberProcessor):  # type: ignore[misc]
        def process(self, req: Message, app_ctx: object) -> Message:
            job_id = str(req.get_header(RequestHeader.JOB_ID))
            running = app_ctx.get_all_job_ids()  # type: ignore[attr-defined]
            if job_id in running:
                return ok_reply(topic=f"reply_{req.topic}", body="still-running")
            super().process(req, app_ctx)
            return ok_reply(topic=f"reply_{req.topic}", body=remove(job_id))

    kept = [
        one
        for one in ClientRequestProcessors.request_processors
        if one.get_topics() != [TrainingTopic.DELETE_RUN]
    ]
    ClientRequestProcessors.request_processors[:] = [*kept, Removals()]
