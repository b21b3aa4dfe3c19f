"""Abort, death, hang and nonsense: each becomes one error, and the next task works."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from trainer_process import Place, TrainerProcess, task_runner

from fedfms.contracts.messages import Failure, Task, TaskFiles, TaskRequest, encode
from fedfms.control import Control
from fedfms.errors import TaskAborted, TrainerError
from fedfms.exchange.tensors import save_tensors
from fedfms.trainer.client import run_task
from fedfms.trainer.connection import ping
from fedfms.trainer.server import (
    EXIT_ABORT_IGNORED,
    EXIT_STALLED,
    TrainerServer,
    alone_in,
    listen,
)

SOME = {"w": torch.zeros(3)}


def files_in(place: Place) -> list[str]:
    return sorted(path.name for path in place.exchange.iterdir())


def wait_for_files(place: Place, names: list[str], seconds: float = 3) -> None:
    deadline = time.monotonic() + seconds
    while files_in(place) != names:
        assert time.monotonic() < deadline, files_in(place)
        time.sleep(0.05)


# --------------------------------------------------------------------------------------- abort


def test_an_abort_reaches_a_running_batch_within_five_seconds(
    shared_trainer: TrainerProcess,
    shared_place: Place,
    long_task: Task,
    train_task: Task,
    global_model,
    begin,
) -> None:
    thread = begin(shared_place, long_task, global_model)
    thread.wait_for_phase("train")
    at = time.monotonic()
    thread.abort.set()
    thread.wait()
    assert isinstance(thread.error, TaskAborted)
    assert thread.ended_at - at < 5
    shared_trainer.wait_until_idle(max(0.1, 5 - (time.monotonic() - at)))
    assert shared_trainer.process.poll() is None
    wait_for_files(shared_place, ["trainer.sock"])
    assert run_task(shared_place.exchange, train_task, global_model).tensors


def test_an_abort_is_heard_while_large_checkpoints_are_read(
    place: Place, start, train_task: Task, global_model, begin
) -> None:
    """ViT-H has 2.6 GB, which a hospital's share gives within a minute."""
    folder = place.root / "checkpoints"
    shutil.copytree(place.checkpoints, folder)
    with (folder / "large.safetensors").open("wb") as file:
        file.truncate(200 * 10**9)  # zeros that take no room, and minutes to be read
    place.checkpoints = folder
    trainer = start()
    thread = begin(place, train_task, global_model)
    thread.wait_for_phase("prepare")
    time.sleep(1)
    at = time.monotonic()
    thread.abort.set()
    thread.wait()
    assert isinstance(thread.error, TaskAborted)
    assert thread.ended_at - at < 5
    trainer.wait_until_idle(5)
    assert trainer.process.poll() is None


def test_a_client_that_goes_away_aborts_its_task_and_leaves_no_file(
    shared_trainer: TrainerProcess, shared_place: Place, long_task: Task, global_model
) -> None:
    files = TaskFiles(shared_place.exchange, "00112233445566aa")
    save_tensors(files.received, global_model, None)
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(shared_place.exchange / "trainer.sock"))
        stream.sendall(encode(TaskRequest(files.task_id, long_task)))
        lines = stream.makefile("rb")
        while b'"train"' not in lines.readline():
            pass
        lines.close()
    shared_trainer.wait_until_idle(5)
    wait_for_files(shared_place, ["trainer.sock"])


def test_a_computation_that_ignores_the_abort_ends_with_the_process(
    place: Place, start, train_task: Task, global_model, begin
) -> None:
    (place.policy / "privacy.json").unlink()
    os.mkfifo(place.policy / "privacy.json")  # to read it blocks, as a dead network share does
    trainer = start()
    thread = begin(place, train_task, global_model)
    thread.wait_for_phase("prepare")
    at = time.monotonic()
    thread.abort.set()
    thread.wait()
    assert isinstance(thread.error, TaskAborted)
    assert trainer.process.wait(5) == EXIT_ABORT_IGNORED
    assert time.monotonic() - at < 6
    (place.policy / "privacy.json").unlink()
    place.set_policy(min_cases=2)
    start()  # a supervisor starts it again; the old socket is still there
    assert run_task(place.exchange, train_task, global_model).tensors


def test_a_private_folder_has_one_trainer(tmp_path: Path) -> None:
    """Two, with an exchange folder each, would count what leaves each for itself."""
    work = tmp_path / "work"
    with alone_in(work):
        with pytest.raises(TrainerError, match="works in") as caught, alone_in(work, seconds=0.2):
            pass
        assert caught.value.code == "trainer-running"
    with alone_in(work, seconds=0):  # which has ended
        pass


def test_what_names_patients_is_for_its_own_user(
    place: Place, train_task: Task, global_model
) -> None:
    runner = task_runner(place)
    runner.run(train_task, lambda: global_model, Control())
    server = TrainerServer(runner, place.exchange)
    server._tell_the_site(TaskRequest("0" * 16, train_task), "SiteDataError (x)", "Meier_Anna.png")
    assert "Meier_Anna.png" in (place.work / "errors.log").read_text()
    for path in [*place.work.iterdir(), *(place.work / "scores").iterdir()]:
        if path.suffix in (".log", ".csv") or path.is_dir() or path.name.startswith("history"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_an_abort_while_waiting_for_the_trainer_is_heard(place: Place, train_task: Task) -> None:
    at = time.monotonic()
    with pytest.raises(TaskAborted):
        run_task(place.exchange, train_task, SOME, aborted=lambda: time.monotonic() > at + 0.5)
    assert time.monotonic() - at < 2


# --------------------------------------------------------------------------------------- death


def test_a_connection_that_a_dying_trainer_still_took_goes_on_to_its_successor(
    place: Place, start, train_task: Task, global_model, begin
) -> None:
    with socket.socket(socket.AF_UNIX) as dying:
        dying.bind(str(place.exchange / "trainer.sock"))
        dying.listen()
        thread = begin(place, train_task, global_model, connect_seconds=120)
        dying.accept()[0].close()
    start(wait=False)
    thread.wait()
    assert thread.error is None
    assert thread.result.contribution.role == "train"


def test_a_trainer_that_clears_the_folder_while_the_model_is_written_gets_it_again(
    place: Place, start, train_task: Task, global_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    replace, cleared = Path.replace, []

    def clear_first(part: Path, target: Path) -> Path:
        if not cleared:
            cleared.append(part)
            part.unlink()  # as a trainer does that starts at this moment
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", clear_first)
    assert run_task(place.exchange, train_task, global_model).tensors
    assert cleared


def test_a_killed_trainer_is_an_error_and_its_successor_works(
    place: Place, start, long_task: Task, train_task: Task, global_model, begin
) -> None:
    trainer = start()
    thread = begin(place, long_task, global_model)
    thread.wait_for_phase("train")
    at = time.monotonic()
    trainer.kill()
    thread.wait()
    assert thread.ended_at - at < 10  # and not the 120 s after which it would count as hung
    assert isinstance(thread.error, TrainerError)
    assert thread.error.code == "trainer-died"
    assert files_in(place) == ["trainer.sock"]  # stale
    again = begin(place, train_task, global_model, connect_seconds=120)  # waits for it
    (place.exchange / "ffeeddccbbaa0099.out.safetensors").write_bytes(b"left by the dead one")
    start(wait=False)
    again.wait()
    assert again.error is None
    assert again.result is not None
    assert again.result.tensors
    wait_for_files(place, ["trainer.sock"])


def test_no_trainer_is_an_error_after_the_time_given(place: Place, train_task: Task) -> None:
    at = time.monotonic()
    with pytest.raises(TrainerError, match="start the trainer") as caught:
        run_task(place.exchange, train_task, SOME, connect_seconds=0.5)
    assert caught.value.code == "no-trainer"
    assert 0.5 <= time.monotonic() - at < 3
    assert files_in(place) == []


def test_sigterm_in_a_task_ends_in_order(
    place: Place, start, long_task: Task, global_model, begin
) -> None:
    trainer = start()
    thread = begin(place, long_task, global_model)
    thread.wait_for_phase("train")
    trainer.kill(signal.SIGTERM)
    assert trainer.process.wait(6) == 0
    thread.wait()
    assert isinstance(thread.error, TrainerError)
    assert thread.error.code == "trainer-stopped"
    assert files_in(place) == []


def test_a_second_trainer_leaves_the_first_alone(place: Place, start) -> None:
    first = start()
    second = start(wait=False)
    assert second.process.wait(60) == 2
    assert "stop it first" in (place.root / "trainer.log").read_text()
    assert ping(place.exchange).site == "site-1"
    assert first.process.poll() is None


def test_a_file_in_the_sockets_place_is_not_deleted(place: Place, start) -> None:
    (place.exchange / "trainer.sock").write_text("something else")
    assert start(wait=False).process.wait(60) == 2
    assert (place.exchange / "trainer.sock").read_text() == "something else"


def test_only_this_user_and_its_group_may_ask(tmp_path: Path) -> None:
    with listen(tmp_path):
        assert stat.S_IMODE((tmp_path / "trainer.sock").stat().st_mode) == 0o660


def test_a_path_too_long_for_a_socket_works_all_the_same(tmp_path: Path) -> None:
    exchange = tmp_path / ("long-" * 20) / ("name-" * 20)
    listener = listen(exchange)
    try:
        with pytest.raises(TrainerError) as caught:  # it connects, and nobody reads
            ping(exchange, 0.3)
        assert caught.value.code == "trainer-hung"
    finally:
        listener.close()


# ---------------------------------------------------------------------------------------- hang


def test_a_stopped_trainer_counts_as_hung(
    place: Place, start, long_task: Task, train_task: Task, global_model, begin
) -> None:
    trainer = start()
    thread = begin(place, long_task, global_model, stall_seconds=2.0)
    thread.wait_for_phase("train")
    trainer.kill(signal.SIGSTOP)
    at = time.monotonic()
    thread.wait()
    assert isinstance(thread.error, TrainerError)
    assert thread.error.code == "trainer-hung"
    assert 1 < thread.ended_at - at < 5
    with pytest.raises(TrainerError) as caught:  # also with a task that it never saw
        run_task(place.exchange, train_task, global_model, stall_seconds=1.0)
    assert caught.value.code == "trainer-hung"
    trainer.kill(signal.SIGCONT)  # sees that its clients are gone, and is free again
    assert run_task(place.exchange, train_task, global_model).tensors
    wait_for_files(place, ["trainer.sock"])


def test_a_computation_without_sign_of_life_ends_the_process(
    place: Place, start, train_task: Task, global_model
) -> None:
    place.set_site(stall_seconds=1.5)
    (place.policy / "privacy.json").unlink()
    os.mkfifo(place.policy / "privacy.json")
    trainer = start()
    with pytest.raises(TrainerError) as caught:
        run_task(place.exchange, train_task, global_model)
    assert caught.value.code in ("trainer-stalled", "trainer-died")
    assert trainer.process.wait(5) == EXIT_STALLED


# -------------------------------------------------------------------------------------- slowly


class SlowToWrite(dict):
    """A model that takes a while to read, as one of gigabytes on a busy machine."""

    def __getitem__(self, name: str) -> torch.Tensor:
        time.sleep(1.5 / len(self))
        return super().__getitem__(name)


def test_a_model_that_takes_long_to_write_is_no_reason_to_hang_up(
    place: Place, start, train_task: Task, global_model
) -> None:
    start(request_seconds=0.5)
    at = time.monotonic()
    assert run_task(place.exchange, train_task, SlowToWrite(global_model)).tensors
    assert time.monotonic() - at > 1.5
    wait_for_files(place, ["trainer.sock"])


@pytest.mark.parametrize("said", [b"", b'{"type":"ta'])
def test_a_client_that_does_not_say_what_it_wants_is_called_too_slow(
    place: Place, start, said: bytes
) -> None:
    start(request_seconds=0.5)
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(place.exchange / "trainer.sock"))
        stream.settimeout(10)
        stream.sendall(said)
        line = stream.makefile("rb").readline()
    assert b'"code":"too-slow"' in line
    log = (place.root / "trainer.log").read_text()
    assert "did not ask for anything in 0.5 s" in log


def test_a_trainer_that_starts_after_the_model_was_written_gets_it_all_the_same(
    place: Place, start, train_task: Task, global_model, begin
) -> None:
    task = begin(place, train_task, global_model, connect_seconds=120)
    deadline = time.monotonic() + 30
    while not any(name.endswith(".in.safetensors") for name in files_in(place)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    start(wait=False)  # clears the folder
    task.wait()
    assert task.error is None
    assert task.result.tensors
    wait_for_files(place, ["trainer.sock"])


@pytest.mark.parametrize(
    ("code", "fix"), [("too-slow", "busy"), ("trainer-stalled", "stall_seconds")]
)
def test_a_time_out_that_the_trainer_reports_says_what_to_do(
    tmp_path: Path, train_task: Task, code: str, fix: str
) -> None:
    with pytest.raises(TrainerError) as caught:
        ask_a_server_that_says(encode(Failure("TrainerError", code)), tmp_path, train_task)
    assert caught.value.code == code
    assert fix in caught.value.fix


# ------------------------------------------------------------------------------------ nonsense


@pytest.mark.parametrize(
    "answer",
    [
        b"hello\n",
        b"{}\n",
        b"[]\n",
        b'{"type":"dance"}\n',
        b'{"type":"progress","phase":"train","done":-1,"total":1}\n',
        b'{"type":"progress","phase":"train","done":1,"total":1,"patient":"x"}\n',
        b'{"type":"progress","phase":"../x y","done":1,"total":1}\n',
        b'{"type":"failure","error":"KeyboardInterrupt","code":"x","exception":null}\n',
        b'{"type":"failure","error":"SiteDataError","code":"Jane Doe.nii","exception":null}\n',
        b'{"type":"pong","protocol":3,"site":"s","version":"1","busy":false}\n',
        b'{"type":"reply","contribution":{},"has_tensors":false,"pictures":0}\n',
        b'{"type":"reply","contribution":{"loss":NaN},"has_tensors":false,"pictures":0}\n',
        b"\x00" * 300_000,
        b"[" * 200_000 + b"\n",
    ],
)
def test_nonsense_from_the_trainers_side_is_one_error(
    tmp_path: Path, train_task: Task, answer: bytes
) -> None:
    with pytest.raises(TrainerError, match="same version") as caught:
        ask_a_server_that_says(answer, tmp_path, train_task)
    assert caught.value.code == "nonsense"
    assert "Doe" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["trainer.sock"]


def test_a_reply_about_another_task_or_without_its_files_is_nonsense(
    tmp_path: Path, train_task: Task, shared_trainer, shared_place: Place, global_model
) -> None:
    report = run_task(shared_place.exchange, train_task, global_model).contribution
    from fedfms.contracts.messages import Reply

    others = [
        dataclasses.replace(report, **change)
        for change in (
            {"site": "site-2"},
            {"kind": "evaluate"},
            {"round": 2},
            {"model": "best"},
            {"recipe_sha256": "0" * 64},
        )
    ]
    for reply, why in (
        *((Reply(other, True, 0), "about another task") for other in others),
        (Reply(report, False, 0), "contradict each other"),
        (Reply(report, True, 0), "cannot be read"),
    ):
        with pytest.raises(TrainerError, match=why) as caught:
            ask_a_server_that_says(encode(reply), tmp_path, train_task)
        assert caught.value.code == "nonsense"
    large = safetensors.torch.save({"w": torch.zeros(2**19)})  # of a model of three numbers
    with pytest.raises(TrainerError, match="cannot be read") as caught:
        ask_a_server_that_says(encode(Reply(report, True, 0)), tmp_path, train_task, large)
    assert caught.value.code == "nonsense"


def test_another_protocol_is_named(tmp_path: Path, train_task: Task) -> None:
    with pytest.raises(TrainerError, match="protocol") as caught:
        ask_a_server_that_says(
            b'{"type":"pong","protocol":9,"site":"s","version":"9","busy":false}\n',
            tmp_path,
            train_task,
        )
    assert caught.value.code == "other-protocol"


def ask_a_server_that_says(
    answer: bytes, exchange: Path, task: Task, result: bytes | None = None
) -> None:
    """One task for a server that says this and puts down this result."""
    (exchange / "trainer.sock").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(exchange / "trainer.sock"))
        listener.listen()

        def serve() -> None:
            stream, _ = listener.accept()
            with stream:
                asked = json.loads(stream.makefile("rb").readline())
                if result is not None:
                    TaskFiles(exchange, asked["task_id"]).result.write_bytes(result)
                try:
                    stream.sendall(answer)
                    while stream.recv(65536):
                        pass
                except OSError:
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            run_task(exchange, task, SOME, stall_seconds=5.0)
        finally:
            thread.join(10)


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"type":"abort"}\n',
        b'{"type":"task","protocol":3}\n',
        b'{"type":"task","protocol":3,"task_id":"../../etc/passwd","kind":"train","site":"site-1",'
        b'"job":"j","round":0,"model":"round","recipe":RECIPE}\n',
        b'{"type":"task","protocol":3,"task_id":"0123456789abcdef","kind":"train","site":"site-1",'
        b'"job":"../../x","round":0,"model":"round","recipe":RECIPE}\n',
        b"x" * 600_000 + b"\n",
    ],
)
def test_nonsense_from_the_clients_side_gets_an_answer_and_harms_nothing(
    shared_trainer: TrainerProcess, shared_place: Place, train_task: Task, request_line: bytes
) -> None:
    request_line = request_line.replace(b"RECIPE", json.dumps(train_task.recipe.to_dict()).encode())
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(shared_place.exchange / "trainer.sock"))
        stream.settimeout(10)
        try:
            stream.sendall(request_line)
            line = stream.makefile("rb").readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        assert line == b"" or b'"code":"nonsense"' in line
    assert not ping(shared_place.exchange).busy


def test_a_recipe_that_cannot_be_is_refused_with_its_own_code(
    shared_trainer, shared_place: Place, train_task: Task
) -> None:
    line = encode(TaskRequest("0123456789abcdef", train_task))
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(shared_place.exchange / "trainer.sock"))
        stream.sendall(line.replace(b'"rounds":3', b'"rounds":0'))
        answer = stream.makefile("rb").readline()
    assert b'"code":"recipe"' in answer
