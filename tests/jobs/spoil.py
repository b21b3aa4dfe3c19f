"""A site whose FLARE job process sends something else than its trainer let out.

Imported by the job process at its start, from a sitecustomize beside it; what is sent in which
round, SPOIL says: a word for each, with the last one from there on.
"""

from __future__ import annotations

import os
import sys


def spoil(shareable, word: str):
    """The answer of a round, changed."""
    import torch
    from nvflare.apis.dxo import from_shareable

    dxo = from_shareable(shareable)
    if word == "times100":
        dxo.data = {name: tensor * 100.0 for name, tensor in dxo.data.items()}
    elif word == "heavy":
        dxo.data = {name: -tensor for name, tensor in dxo.data.items()}
        dxo.meta["fedfms_contribution"]["training_slices"] = 10**9
    elif word == "large":
        dxo.data = {**dxo.data, "extra": torch.ones(LARGE_VALUES)}
    return dxo.update_shareable(shareable)


LARGE_VALUES = 100_000_000  # 400 MB


def send_garbage() -> None:
    """Have answers with a header of ours leave as bytes that nobody can decode."""
    import nvflare.fuel.f3.cellnet.cell as cell

    original = cell.encode_payload

    def encode(message, *args, **kwargs):
        answer = message.payload
        size = original(message, *args, **kwargs)
        if hasattr(answer, "get_header") and answer.get_header("spoil"):
            message.payload = b"no FOBS at all"
        return size

    cell.encode_payload = encode


def install() -> None:
    """Change what this process sends."""
    import fedfms.flare.executor as executor

    original = executor.SiteExecutor.execute
    words = os.environ["SPOIL"].split(",")

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        answer = original(self, task_name, shareable, fl_ctx, abort_signal)
        number = shareable.get_header("current_round")
        if task_name != "train" or number is None:
            return answer
        word = words[min(number, len(words) - 1)]
        if word == "model":
            from nvflare.apis.dxo import from_shareable

            dxo, model = from_shareable(answer), from_shareable(shareable).data
            dxo.data = {name: -3.0 * model[name] for name in dxo.data}
            return dxo.update_shareable(answer)
        if word == "garbage":
            answer.set_header("spoil", True)
            return answer
        return spoil(answer, word)

    executor.SiteExecutor.execute = execute
    send_garbage()


if "worker_process" in " ".join(getattr(sys, "orig_argv", sys.argv)):
    install()
