"""The archive of a server: what is in it, and what a damaged one changes, which is nothing."""

from __future__ import annotations

import json
import stat
import tarfile
from pathlib import Path

import pytest

from fedfms.errors import ConfigError, FederationError
from fedfms.provisioning.backup import backup, restore


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A workspace with a run that goes on, a job, and what need not be kept; and a kit."""
    workspace = tmp_path / "workspace"
    files = {
        "runs/a/job.json": "{}",
        "runs/a/round-0002/global_model.safetensors": "model" * 1000,
        "runs/a/.x.12345678.part": "half",
        "storage/jobs/a/meta": "{}",
        "storage/jobs/a/data": "job",
        "audit.log": "line\n",
        "log.txt": "wordy",
        "startup/server.key": "copy",
        "0b1f3b9e-7a52-4a7d-9d34-7c2f4f1f9a10/fedfms/records.jsonl": "running",
    }
    kit = {"startup/server.key": "key", "local/resources.json": "{}", "fedfms.json": "{}"}
    for folder, contents in ((workspace, files), (tmp_path / "kit", kit)):
        for name, text in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    uri_root = str(workspace / "storage" / "jobs")
    manager = {"id": "job_manager", "args": {"uri_root": uri_root}}
    (tmp_path / "kit/local/resources.json").write_text(json.dumps({"components": [manager]}))
    return workspace


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_what_cannot_be_made_anew_comes_back_and_nothing_else(server: Path, tmp_path: Path) -> None:
    before = tree(server)
    made = backup(tmp_path / "server.tar", server, tmp_path / "kit")
    assert (made.runs, made.jobs) == (1, 1)
    assert tree(server) == before  # no trace
    assert stat.S_IMODE(made.file.stat().st_mode) == 0o600
    new = tmp_path / "new"
    restore(made.file, new / "workspace", new / "kit")
    kept = ("runs/a/job.json", "runs/a/round-0002/global_model.safetensors", "audit.log")
    stored = ("storage/jobs/a/meta", "storage/jobs/a/data")
    assert tree(new / "workspace") == {name: before[name] for name in (*kept, *stored)}
    assert tree(new / "kit") == tree(tmp_path / "kit")
    with pytest.raises(ConfigError, match="new volume or folder"):
        restore(made.file, new / "workspace")


@pytest.mark.parametrize("place", [513, 3000, -20000])
def test_a_damaged_archive_changes_nothing(server: Path, tmp_path: Path, place: int) -> None:
    made = backup(tmp_path / "server.tar", server, tmp_path / "kit")
    data = bytearray(made.file.read_bytes())
    data[place] ^= 1
    made.file.write_bytes(data)
    with pytest.raises(FederationError, match="nothing was changed"):
        restore(made.file, tmp_path / "new")
    assert not list((tmp_path / "new").rglob("*"))


def test_an_archive_may_not_write_elsewhere(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "server.tar", "w") as tar:
        (tmp_path / "file").write_text("x")
        tar.add(tmp_path / "file", "workspace/../../outside")
    with pytest.raises(FederationError, match="would write to"):
        restore(tmp_path / "server.tar", tmp_path / "new" / "workspace")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "new" / "outside").exists()
