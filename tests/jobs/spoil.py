"""A site that sends something else than it learnt.

Imported at the start of its trainer and of its FLARE job process, from a sitecustomize beside it.
What is sent in which round, SPOIL says: a word for each, with the last one from there on. The
trainer's words change what has passed the door, before there is a receipt of it; the others change
on the way what the trainer signed.
"""

from __future__ import annotations

import dataclasses
import os
import sys

OF_THE_TRAINER = ("times100", "heavy", "model")


def word_of(number: int) -> str:
    words = os.environ["SPOIL"].split(",")
    return words[min(number, len(words) - 1)]


def spoil_in_the_trainer() -> None:
    """Change what leaves, as somebody does who has changed the trainer."""
    import fedfms.trainer.tasks as tasks

    door, write = tasks.pass_door, tasks.write_travelling
    received = {}

    def write_travelling(model, sent) -> None:
        received.update(sent)
        write(model, sent)

    def pass_door(policy, site, recipe, expected, tensors, contribution, *others):
        leaving, report = door(policy, site, recipe, expected, tensors, contribution, *others)
        word = word_of(report.round) if report.kind == "train" else ""
        if word == "times100":
            leaving = {name: tensor * 100.0 for name, tensor in leaving.items()}
        elif word == "heavy":
            leaving = {name: -tensor for name, tensor in leaving.items()}
            report = dataclasses.replace(report, training_slices=10**9)
        elif word == "model":
            leaving = {name: -3.0 * received[name].float() for name in leaving}
        return leaving, report

    tasks.pass_door, tasks.write_travelling = pass_door, write_travelling


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


def spoil_on_the_way() -> None:
    """Change what the FLARE job process sends."""
    import torch
    from nvflare.apis.dxo import from_shareable

    import fedfms.flare.executor as executor

    original = executor.SiteExecutor.execute

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        answer = original(self, task_name, shareable, fl_ctx, abort_signal)
        number = shareable.get_header("current_round")
        word = word_of(number) if task_name == "train" and number is not None else ""
        if word in ("", *OF_THE_TRAINER):
            return answer
        if word == "garbage":
            answer.set_header("spoil", True)
            return answer
        dxo = from_shareable(answer)
        if word == "forged":
            dxo.data = {name: tensor * 2.0 for name, tensor in dxo.data.items()}
        elif word == "large":
            dxo.data = {**dxo.data, "extra": torch.ones(LARGE_VALUES)}
        return dxo.update_shareable(answer)

    executor.SiteExecutor.execute = execute
    send_garbage()


if "SPOIL" in os.environ:
    started_as = " ".join(getattr(sys, "orig_argv", sys.argv))
    if "worker_process" in started_as:
        spoil_on_the_way()
    elif "fedfms.trainer" in started_as:
        spoil_in_the_trainer()
