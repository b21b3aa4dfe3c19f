"""Asking a server before a site joins: FLARE's challenge, the one question that needs no login."""

from __future__ import annotations

import json
import secrets
import time
import uuid

from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.fuel.f3.cellnet.cell import Cell
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

from fedfms.flare.greeting import REVOKED, TIME, VERSION
from fedfms.preflight.kit import Kit
from fedfms.preflight.network import NetworkError, ServerGreeting

ASK_SECONDS = 5.0  # for one answer; a connection is made meanwhile
ATTEMPTS = 2


def ask_server(kit: Kit) -> ServerGreeting:
    """Challenge the server as FLARE's registration does, under a name beside the site's own.

    The site's own FLARE client may be connected meanwhile; nothing is registered.

    Raises:
        NetworkError: code flare.
    """
    flare_decomposers.register()  # or the reply cannot be read
    target, scheme, identity = _server_of(kit)
    name = kit.about.participant
    cell = Cell(
        fqcn=FQCN.join([name, f"check-{secrets.token_hex(4)}"]),
        root_url=f"{scheme}://{target}",
        secure=True,
        credentials={
            DriverParams.CA_CERT.value: str(kit.root_file),
            DriverParams.CLIENT_CERT.value: str(kit.certificate_file),
            DriverParams.CLIENT_KEY.value: str(kit.key_file),
        },
        auth_identity=name,
        auth_identity_map={FQCN.ROOT_SERVER: identity},
    )
    cell.start()
    try:
        for _ in range(ATTEMPTS):
            asked = time.time()
            reply = cell.send_request(
                channel=CellChannel.SERVER_MAIN,
                topic=CellChannelTopic.Challenge,
                target=FQCN.ROOT_SERVER,
                request=new_cell_message(
                    {
                        IdentityChallengeKey.COMMON_NAME: name,
                        IdentityChallengeKey.NONCE: str(uuid.uuid4()),
                    },
                    None,
                ),
                timeout=ASK_SECONDS,
                optional=True,
            )
            answered = time.time()
            code = reply.get_header(MessageHeaderKey.RETURN_CODE)
            if code == ReturnCode.OK:
                break
            time.sleep(0.5)
        else:
            raise NetworkError(
                f"the server at {target} does not answer FLARE's greeting ({code})",
                "ask the coordinator whether the server has started and is of this project",
                code="flare",
            )
    finally:
        cell.stop()
    there = reply.get_header(TIME)
    return ServerGreeting(
        reply.get_header(VERSION),
        None if there is None else there - (asked + answered) / 2,
        reply.get_header(REVOKED),
    )


def _server_of(kit: Kit) -> tuple[str, str, str]:
    """Target, scheme and identity of the server, from the kit's fed_client.json."""
    try:
        values = json.loads((kit.folder / "startup" / "fed_client.json").read_text())
        server = values["servers"][0]
        service = server["service"]
        return service["target"], service.get("scheme", "grpc"), server["identity"]
    except (OSError, ValueError, LookupError, TypeError):
        raise NetworkError(
            f"{kit.folder}/startup/fed_client.json does not name a server",
            "unzip the kit again; if that does not help, ask the coordinator for a new one",
            code="flare",
        ) from None
