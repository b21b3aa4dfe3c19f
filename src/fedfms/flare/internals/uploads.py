"""What a site sends to a job's process at the server: bounded before it is parsed, and never fatal.

Read in FLARE 2.9.0 (`fuel/f3/cellnet/cell.py`, `fuel/f3/streaming/`). A message comes as a blob
that holds references to its tensors, and while it is decoded these are asked for in chunks of whole
tensors. FLARE takes blobs of 4 GiB and tensors without a bound, so that one site's answer could
take all of the server's memory. And an answer that cannot be decoded ends the job's process, on
purpose, as does a site that calls a message of the server too large. All of that is for every party
of a network of friends; here a site may be anything.

`bound_uploads` sets bounds of the job's own model. Whatever is beyond them, or cannot be decoded,
becomes an error reply of that site, which passes on as any other: it is recorded, and the round
goes on.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from nvflare.apis.fl_constant import (
    FLContextKey,
    ReservedKey,
    ReturnCode,
    ServerCommandNames,
)
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.fuel.f3.cellnet import cell as cell_module
from nvflare.fuel.f3.cellnet.cell import Adapter, Cell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming import blob_streamer
from nvflare.fuel.f3.streaming.blob_streamer import BlobHandler, BlobTask
from nvflare.fuel.f3.streaming.cacheable import ItemConsumer
from nvflare.fuel.f3.streaming.download_service import download_object
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
from nvflare.private.defs import CellMessageHeaderKeys
from nvflare.private.fed.server.fed_server import FederatedServer
from nvflare.private.fed.server.server_command_agent import ServerCommandAgent

from fedfms.flare.internals.version import Assumption, broken_assumptions, changed, takes, uses

log = logging.getLogger(__name__)

# as FLARE has them
_decode, _consume = cell_module.decode_payload, ItemConsumer.consume
_PAYLOAD = MessageHeaderKey.PAYLOAD_ENCODING

BLOBS = Assumption(
    "a blob that comes is a BlobTask(future, stream, max_size, preserve_chunks) of its module, "
    "which raises where it is too large before anything is kept",
    lambda: (
        uses(BlobHandler.handle_blob_cb, "BlobTask", "max_blob_size", "_fail_and_notify")
        and takes(BlobTask.__init__, "future", "stream", "max_size", "preserve_chunks")
        and uses(BlobTask.__init__, "StreamError", "get_size", "_make_blob_size_error")
    ),
)
ITEMS = Assumption(
    "tensors come by ItemConsumer.consume(ref_id, state, data) with a list of bytes, and an error "
    "that it raises ends the download",
    lambda: (
        takes(_consume, "ref_id", "state", "data")
        and uses(_consume, "consume_items", "result")
        and callable(download_object)
    ),
)
DECODING = Assumption(
    "an answer is decoded by the decode_payload of its module, with the stream's headers in the "
    "message, and where that raises, or a message was too large, the module's os._exit is called",
    lambda: (
        uses(Adapter.call, "decode_payload", "PAYLOAD_ENCODING", "SUBMIT_UPDATE", "os", "_exit")
        and uses(Adapter._handle_reply_stream_done, "os", "_exit")
        and uses(Cell._process_stream_error, "os", "_exit")
        and takes(_decode, "message", "encoding_key", "fobs_ctx")
    ),
)
TASKS = Assumption(
    "a workflow's communicator knows the tasks that sites are at as _client_task_map, and a job's "
    "process takes an answer by its server's command_agent.execute_command(request)",
    lambda: (
        uses(WFCommServer.process_submission, "_do_process_submission")
        and uses(WFCommServer._do_process_submission, "_client_task_map")
        and takes(ServerCommandAgent.execute_command, "request")
        and uses(FederatedServer.__init__, "command_agent")
    ),
)

TOO_LARGE, UNDECODABLE = "upload-too-large", "malformed-report"  # codes

_why = threading.local()  # .code of what the thread that decodes came upon


class TooLarge(Exception):
    """More was sent than the bound allows."""


class Uploads:
    """The bounds of one job's process.

    Args:
        engine: FLARE's, of the job's process.
        job_id: FLARE's.
        largest: bytes that one message, and what it refers to, may have.
        refusal: makes the headers of an error reply from a code.
    """

    def __init__(
        self, engine: Any, job_id: str, largest: int, refusal: Callable[[str], dict[str, str]]
    ) -> None:
        self.engine, self.job_id, self.largest = engine, job_id, largest
        self.refusal = refusal
        self._turned_away: set[str] = set()  # cells of sites of which a blob was too large

    def decode(self, message: Message, encoding_key: str, fobs_ctx: Any) -> None:
        """Decode a message; an answer that cannot be decoded becomes an error reply."""
        _why.code = UNDECODABLE
        try:
            _decode(message, encoding_key, fobs_ctx=fobs_ctx)
        except Exception as error:
            if not _is_answer(message.headers):
                raise
            code = _why.code
            origin = message.headers.get(MessageHeaderKey.ORIGIN)
            if origin in self._turned_away:  # one of the tensors that the answer refers to
                self._turned_away.discard(origin)
                code = TOO_LARGE
            log.error("an answer was refused (%s): %s", code, type(error).__name__)
            message.payload = self.stand_in(message.headers, code)
            message.remove_header(encoding_key)

    def turn_away(self, headers: dict[str, Any]) -> None:
        """Answer for a site whose message is not taken at all."""
        if not _is_answer(headers):
            self._turned_away.add(str(headers.get(MessageHeaderKey.ORIGIN)))
        else:
            log.error("an answer was refused (%s)", TOO_LARGE)
            request = Message(dict(headers), self.stand_in(headers, TOO_LARGE))
            request.set_header(MessageHeaderKey.CHANNEL, headers.get(StreamHeaderKey.CHANNEL))
            request.set_header(MessageHeaderKey.TOPIC, headers.get(StreamHeaderKey.TOPIC))
            self.engine.server.command_agent.execute_command(request)

    def stand_in(self, headers: dict[str, Any], code: str) -> Shareable:
        """An error reply to the task that the sender of a message is at."""
        reply = make_reply(ReturnCode.EXECUTION_RESULT_ERROR, self.refusal(code))
        client = self.engine.server.client_manager.clients.get(
            headers.get(CellMessageHeaderKeys.TOKEN)
        )
        name = client.name if client is not None else ""
        sender = FLContext()
        sender.put(ReservedKey.RUN_NUM, self.job_id, private=False, sticky=False)
        sender.put(ReservedKey.IDENTITY_NAME, name, private=False, sticky=False)
        reply.set_peer_context(sender)
        if (at_work := self._task_of(name)) is not None:
            reply.set_cookie_jar(dict(at_work.task.data.get_cookie_jar() or {}))
            reply.set_header(FLContextKey.TASK_NAME, at_work.task.name)
            reply.add_cookie(FLContextKey.TASK_ID, at_work.id)
        return reply

    def _task_of(self, name: str) -> Any:
        """What a site was asked last and has not answered."""
        with self.engine.new_context() as fl_ctx:
            workflow = fl_ctx.get_prop(FLContextKey.RUNNER).current_wf
        if workflow is None:
            return None
        known = workflow.controller.communicator._client_task_map
        own = [
            one
            for one in list(known.values())
            if one.client.name == name and one.result_received_time is None
        ]
        return max(own, key=lambda one: one.task_sent_time or 0.0, default=None)


def bound_uploads(uploads: Uploads) -> None:
    """Let these bounds hold in this process; again is no harm, the last ones hold.

    With a FLARE that does it otherwise nothing is done, and a line of the log says so.
    """
    if broken := broken_assumptions("uploads"):
        log.warning("what a site sends is not bounded: %s", changed(broken).problem)
        return

    class Bounded(BlobTask):  # type: ignore[misc]
        def __init__(
            self, future: Any, stream: Any, max_size: int = 0, preserve_chunks: bool = False
        ) -> None:
            most = min(max_size, uploads.largest) if max_size > 0 else uploads.largest
            if stream.get_size() > most:
                threading.Thread(
                    target=uploads.turn_away, args=(dict(stream.headers or {}),), daemon=True
                ).start()
            super().__init__(future, stream, most, preserve_chunks)

    def consume(self: ItemConsumer, ref_id: str, state: dict[str, Any], data: Any) -> Any:
        size = sum(len(item) for item in data) if isinstance(data, list) else 0
        self.fedfms_bytes = getattr(self, "fedfms_bytes", 0) + size
        if self.fedfms_bytes > uploads.largest:
            _why.code = TOO_LARGE
            self.result = None
            raise TooLarge(f"more than {uploads.largest} bytes")
        return _consume(self, ref_id, state, data)

    def decode(message: Message, encoding_key: str = _PAYLOAD, fobs_ctx: Any = None) -> None:
        uploads.decode(message, encoding_key, fobs_ctx)

    blob_streamer.BlobTask = Bounded
    ItemConsumer.consume = consume
    cell_module.decode_payload = decode
    cell_module.os = _Os()


class _Os:
    """The module `os`, with an end that is none."""

    def _exit(self, code: int) -> None:
        log.error("a message of a site would have ended this process (exit code %d)", code)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _is_answer(headers: dict[str, Any]) -> bool:
    return (headers.get(StreamHeaderKey.CHANNEL), headers.get(StreamHeaderKey.TOPIC)) == (
        CellChannel.SERVER_COMMAND,
        ServerCommandNames.SUBMIT_UPDATE,
    )
