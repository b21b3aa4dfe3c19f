"""Questions to a server without a login: FLARE's challenge, over its own cell network.

Read in FLARE 2.9.0 (`fuel/f3/cellnet/`). Public API begins with a login, which an admin has and a
site that wants to know whether it could join has not.
"""

from __future__ import annotations

import contextlib
import inspect
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import (
    CellChannel,
    CellChannelTopic,
    IdentityChallengeKey,
    MessageHeaderKey,
    ReturnCode,
)
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.drivers.driver_params import DriverParams

from fedfms.bounded import read_json_object
from fedfms.flare.internals.version import Assumption, rests_on, uses
from fedfms.kits.kit import Kit

CELL = Assumption(
    "a Cell connects with fqcn, root_url, secure, credentials, auth_identity and "
    "auth_identity_map, and send_request waits for an answer",
    lambda: (
        {"fqcn", "root_url", "secure", "credentials", "auth_identity", "auth_identity_map"}
        <= {*inspect.signature(CoreCell.__init__).parameters}
        and {"channel", "topic", "target", "request", "timeout", "optional"}
        <= {*inspect.signature(CoreCell.send_request).parameters}
        and uses(Cell.__init__, "CoreCell")
        and callable(CoreCell.start)
        and callable(CoreCell.stop)
    ),
)


class ServerAddress(NamedTuple):
    """Where a kit's server is, in FLARE's words."""

    target: str  # host:port
    scheme: str
    identity: str  # the name in its certificate


def server_address(kit: Path) -> ServerAddress:
    """The server that a site's kit names.

    Raises:
        OSError, ValueError, LookupError, TypeError: it names none.
    """
    values = read_json_object(kit / "startup" / "fed_client.json")
    server = values["servers"][0]
    service = server["service"]
    return ServerAddress(service["target"], service.get("scheme", "grpc"), server["identity"])


class Answer(NamedTuple):
    """What a server answered to a challenge."""

    code: str  # FLARE's
    headers: Mapping[str, Any]
    asked: float  # seconds since the epoch
    answered: float
    payload: Any  # what came with it


ANSWERED = str(ReturnCode.OK)  # the code of an answer
Ask = Callable[..., Answer]


@contextlib.contextmanager
@rests_on(CELL)
def asking(server: ServerAddress, kit: Kit) -> Iterator[Ask]:
    """Challenge a server as FLARE's registration does, under a name beside the participant's own.

    Its connection is one of its own, with the kit's certificate; a proxy of the environment is
    gone through. The participant's own client may be connected meanwhile, nothing is registered.

    Yields:
        a function that asks once, with `seconds` for the answer, and `headers` and `payload`
        (bytes) that go along. A connection is made meanwhile; before, asking fails at once.
    """
    name = kit.about.participant
    flare_decomposers.register()  # or the reply cannot be read
    cell = Cell(
        fqcn=FQCN.join([name, f"check-{secrets.token_hex(4)}"]),
        root_url=f"{server.scheme}://{server.target}",
        secure=True,
        credentials={
            DriverParams.CA_CERT.value: str(kit.root_file),
            DriverParams.CLIENT_CERT.value: str(kit.certificate_file),
            DriverParams.CLIENT_KEY.value: str(kit.key_file),
        },
        auth_identity=name,
        auth_identity_map={FQCN.ROOT_SERVER: server.identity},
    )

    def ask(
        seconds: float, headers: Mapping[str, Any] | None = None, payload: bytes | None = None
    ) -> Answer:
        asked = time.time()
        reply = cell.send_request(
            channel=CellChannel.SERVER_MAIN,
            topic=CellChannelTopic.Challenge,
            target=FQCN.ROOT_SERVER,
            request=new_cell_message(
                {
                    IdentityChallengeKey.COMMON_NAME: name,
                    IdentityChallengeKey.NONCE: str(uuid.uuid4()),
                    **(headers or {}),
                },
                payload,
            ),
            timeout=seconds,
            optional=True,
        )
        code = str(reply.get_header(MessageHeaderKey.RETURN_CODE))
        return Answer(code, dict(reply.headers), asked, time.time(), reply.payload)

    cell.start()
    try:
        yield ask
    finally:
        cell.stop()
