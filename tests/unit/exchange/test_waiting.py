"""Differences on a disk: the same bits come back, and nothing stays."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from fedfms.exchange.waiting import Scaled, WaitingRoom, part_of


def some(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (7, 3, 2), "a": (), "c.bias": (0,), "d": (1001,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def test_what_waits_comes_back_bit_for_bit_as_often_as_it_is_asked_for(tmp_path: Path) -> None:
    room = WaitingRoom(tmp_path / "waiting")
    given = {number: some(number) for number in range(3)}
    given[1]["d"] = given[1]["d"].expand(2, 1001).t()[:, 0]  # strided as no file is
    kept = {number: room.put(tensors) for number, tensors in given.items()}
    for _ in range(2):
        for number, tensors in given.items():
            assert list(kept[number]) == sorted(tensors) and len(kept[number]) == 4
            assert all(torch.equal(kept[number][name], tensor) for name, tensor in tensors.items())
    assert dict(room.put({})) == {}
    double = Scaled(kept[0], 2.0)
    assert all(torch.equal(double[name], given[0][name] * 2) for name in double)
    assert len(double) == 4


def test_parts_are_those_of_the_tensor_and_masked_integers_keep_their_type(tmp_path: Path) -> None:
    room = WaitingRoom(tmp_path / "waiting")
    given = some(4)
    kept = room.put(given)
    for tensors in (kept, Scaled(kept, 0.5), given):
        for name in given:
            flat = tensors[name].reshape(-1)
            for start, end in ((0, 3), (2, 40), (990, 5000), (0, 0)):
                assert torch.equal(part_of(tensors, name, start, end), flat[start:end])
    for kind in (torch.int32, torch.int64):
        limits = torch.iinfo(kind)
        whole = torch.tensor([[limits.min, -1, 0], [1, 2, limits.max]], dtype=kind)
        back = room.put({"a": whole, "b": whole.reshape(-1)})
        assert torch.equal(back["a"], whole) and back["a"].dtype == kind
        assert torch.equal(part_of(back, "b", 4, 6), whole.reshape(-1)[4:6])


def test_half_precision_waits_in_half_the_bytes_and_nothing_else_does(tmp_path: Path) -> None:
    room = WaitingRoom(tmp_path / "waiting")
    special = [0.0, -0.0, 2.0**-24, 65504.0, -65504.0, float("inf")]
    exact = torch.cat(
        [
            torch.tensor(special),
            torch.randn(5000, generator=torch.Generator().manual_seed(2)).half().float(),
        ]
    )
    near = exact.clone()
    near[-1] += 2.0**-20  # one value of all, and the last: half precision does not hold it
    beyond = exact.clone()
    beyond[3] = 65520.0
    sizes = {}
    for number, (name, given) in enumerate(
        {"exact": exact, "near": near, "beyond": beyond, "nan": exact * float("nan")}.items(), 1
    ):
        back = room.put({"a": given, "b": exact})
        bits = back["a"].view(torch.int32)
        assert torch.equal(bits, given.view(torch.int32)) and back["a"].dtype == torch.float32
        assert torch.equal(part_of(back, "b", 5, 900), exact[5:900])  # it lies behind the first
        sizes[name] = (tmp_path / f"waiting/{number:06d}.values").stat().st_size - exact.nbytes // 2
    assert sizes["exact"] == exact.nbytes // 2
    assert sizes["near"] == sizes["beyond"] == sizes["nan"] == exact.nbytes


def test_only_this_user_may_look_and_nothing_is_left_when_a_round_closes(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "waiting"
    room = WaitingRoom(folder)
    room.put(some(1))
    assert folder.stat().st_mode & 0o777 == 0o700
    room.clear()
    assert [*folder.iterdir()] == []
    room.put(some(2))
    again = WaitingRoom(folder)  # as after the end of a process
    assert [*folder.iterdir()] == []
    again.close()
    assert not folder.exists()


def test_what_a_full_disk_does_not_take_leaves_nothing(tmp_path: Path) -> None:
    room = WaitingRoom(tmp_path / "waiting")
    path = tmp_path / "waiting" / "000001.values"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="exists"):  # never through a link
        room.put(some(1))
    assert [*(tmp_path / "waiting").iterdir()] == []
    room.put(some(1))


def test_the_error_of_a_full_disk_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = WaitingRoom(tmp_path / "waiting")
    opened = Path.open

    def full(self, mode="r", *args, **kwargs):
        return opened(Path("/dev/full"), "wb", 0) if mode == "xb" else opened(self, mode)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError) as caught:
        room.put(some(1))
    assert caught.value.errno == errno.ENOSPC
