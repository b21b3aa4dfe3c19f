"""The receipt of an answer, between the door and the shared folder: made, signed, logged."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedfms import __version__
from fedfms.about import known_image
from fedfms.contracts.messages import Task
from fedfms.contracts.policy import POLICY_FILE
from fedfms.contracts.receipt import FIRST, Image, Receipt, SignedReceipt, report_sha256
from fedfms.errors import FedfmsError
from fedfms.exchange.tensors import fingerprint, payload_bytes
from fedfms.trainer.egress import EgressLog, Next
from fedfms.trainer.kept import Outcome
from fedfms.trainer.own_key import own_key

log = logging.getLogger(__name__)

_IMAGE: TypeAdapter[str] = TypeAdapter(Image)


@dataclasses.dataclass(slots=True)
class Began:
    """What is noted of a task as soon as its model was read."""

    policy_sha256: str = ""
    model_in_sha256: str = ""


class Receipts:
    """Gives a receipt for each answer of one site.

    Args:
        work: the site's private folder.
        policy: its folder with privacy.json.
    """

    def __init__(self, work: Path, policy: Path) -> None:
        self._work, self._policy = work, policy / POLICY_FILE
        self._log = EgressLog(work)

    def have_key(self) -> None:
        """Make the key where there is none, and say how long a log of before is.

        What keeps either from being made, the next task says.
        """
        try:
            log.info("the key of this trainer is %s", own_key(self._work).public)
        except (OSError, FedfmsError) as error:
            log.error("this trainer has no key of its own, so nothing can leave: %s", error)
            return
        try:
            self._log.begin(own_key(self._work))
        except (OSError, FedfmsError) as error:
            log.error("nothing says how long the log of what left is: %s", error)

    def begin(self, began: Began, sent: Mapping[str, Tensor]) -> None:
        """Note the policy, which was read just now, and the model that came."""
        data = b""
        with contextlib.suppress(OSError):  # without one nothing leaves
            data = self._policy.read_bytes()
        began.policy_sha256 = hashlib.sha256(data).hexdigest()
        began.model_in_sha256 = fingerprint(sent)

    def give(self, task: Task, outcome: Outcome, began: Began) -> SignedReceipt:
        """The receipt of what is about to leave; it is in the log when this returns.

        Raises:
            ConfigError: code trainer-key.
            OSError: the log or the key cannot be written; nothing may leave then.
        """

        def make(after: Next, given_before: Callable[[Receipt], str | None]) -> Receipt:
            values = _values(task, outcome, began)
            values |= {"number": after.number, "previous": after.previous, "time": time.time()}
            receipt = Receipt.from_dict(values)
            return dataclasses.replace(receipt, same_as=given_before(receipt))

        return self._log.add(make, own_key(self._work))


def _values(task: Task, outcome: Outcome, began: Began) -> dict[str, Any]:
    said, tensors = outcome.contribution, outcome.tensors
    return {
        "previous": FIRST,
        "site": said.site,
        "job": task.job,
        "job_name": task.job_name,
        "submitter": task.submitter,
        "kind": said.kind,
        "role": said.role,
        "round": said.round,
        "rounds": task.recipe.rounds_to_run,
        "model": said.model,
        "canary": task.recipe.canary,
        "recipe_sha256": said.recipe_sha256,
        "backbone_sha256": said.backbone_sha256,
        "policy_sha256": began.policy_sha256,
        "package_version": __version__,
        "image": _image(),
        "model_in_sha256": began.model_in_sha256,
        "report_sha256": report_sha256(said),
        "tensors_sha256": fingerprint(tensors) if tensors else None,
        "norm": said.update_norm,  # the door computed it of what leaves
        "values": sum(one.numel() for one in tensors.values()),
        "payload_bytes": payload_bytes(tensors),
        "pictures": [hashlib.sha256(picture).hexdigest() for picture in outcome.pictures],
    }


def _image() -> str | None:
    """The digest, unless it is no name of an image, which could not cross the wire."""
    try:
        return _IMAGE.validate_python(known_image() or "")
    except ValidationError:
        return None
