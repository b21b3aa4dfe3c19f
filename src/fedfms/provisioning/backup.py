"""The server in one file, and back: its jobs, runs, records, kit, and the state of provisioning.

The file is a plain tar:

    workspace/runs/ …      what runs that are not over have reached
    workspace/storage/ …   FLARE's store: jobs as submitted and signed, their status, their results
    workspace/ …           who was shut out, the audit
    kit/ …                 the server's certificate and private key
    provisioning/ …        where it is given: the certificate authority's key and all others
    SHA256SUMS             of all of these

It may be made while runs go on. All files that a run needs are written whole or only grow at their
end, so the moment at which a folder is linked is the moment that is kept; it takes no room. What
can be made anew is left out: logs, folders of running jobs, the copy of the kit that FLARE reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import secrets
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fedfms.bounded import read_json_object, short, tar_members
from fedfms.errors import ConfigError, FederationError, Undecodable
from fedfms.files import PART, is_file
from fedfms.kits.checksums import SIGNATURE_FILE, SUMS_FILE, kit_files

log = logging.getLogger(__name__)

WORKSPACE, KIT, PROVISIONING = "workspace", "kit", "provisioning"
RUNS, STORAGE = "runs", "storage"

_RESOURCES = ("local/resources.json", "local/resources.json.default")  # of a server's kit
_BESIDE = ("readme.txt", SUMS_FILE, SIGNATURE_FILE)  # in a kit, not among what its list names
_LOGS = ("log.", "error_log.", "log_")  # how names of files begin
_MAX_FILES = 1_000_000  # in an archive
_MAX_SUMS_BYTES = 256 << 20  # its list, a line for each
_STALE_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class Backup:
    """What is in an archive."""

    file: Path
    size: int  # bytes
    runs: int  # that were not over
    jobs: int


@dataclass(frozen=True, slots=True)
class _Source:
    name: str  # in the archive
    path: Path


# ----------------------------------------------------------------------------------------- backup


def backup(
    file: Path, workspace: Path, kit: Path | None = None, provisioning: Path | None = None
) -> Backup:
    """Write the server's archive; whole or not at all. The server may be at work.

    Args:
        file: new; its folder is there. For this user only: it holds private keys.
        workspace: of the server.
        kit: its kit, which also says where FLARE's store is.
        provisioning: output folder of `fedfms provision`, if it is on this machine.

    Raises:
        ConfigError: a folder is none of a server's, or something is at `file`.
        FederationError: code disk-full, or unusable-file; the archive could not be written.
    """
    if file.exists():
        raise ConfigError(f"{file} is there already", "name a new file", code="exists")
    if not workspace.is_dir():
        raise ConfigError(
            f"there is no server's workspace at {workspace}",
            "type it where the server's volume is mounted: docker compose run --rm -v "
            '"$PWD:/here" server backup /here/server.tar',
            code="no-workspace",
        )
    storage = _storage_of(kit) or workspace / STORAGE
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}{PART}")
    try:
        with contextlib.ExitStack() as stack:
            # runs before jobs: a run that ends in between is over by its job's status
            runs = stack.enter_context(_linked(workspace / RUNS))
            jobs = stack.enter_context(_linked(storage))
            sources = [*_below(runs, f"{WORKSPACE}/{RUNS}")]
            sources += _below(jobs, f"{WORKSPACE}/{STORAGE}")
            sources += _of_workspace(workspace)
            sources += _of_kit(kit) if kit is not None else []
            sources += _below(provisioning, PROVISIONING) if provisioning is not None else []
            stack.callback(lambda: part.unlink(missing_ok=True))
            _write(part, sources)
            counted = sum(1 for _ in runs.glob("*/job.json")) if runs else 0
            stored = sum(1 for _ in jobs.rglob("meta")) if jobs else 0
            part.rename(file)
    except OSError as error:
        raise FederationError(
            f"the archive {file} could not be written: {error.strerror or error}",
            "name a file in a folder with room that this user may write; links need a little room "
            "on the server's own disk, too",
            code="unusable-file",
        ) from None
    return Backup(file, file.stat().st_size, counted, stored)


def _storage_of(kit: Path | None) -> Path | None:
    """Where a kit has FLARE's store: the folder that holds the one for jobs."""
    for name in _RESOURCES if kit is not None else ():
        with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):
            assert kit is not None  # nothing to look for otherwise
            components = read_json_object(kit / name)["components"]
            args: Any = next(c["args"] for c in components if c.get("id") == "job_manager")
            return Path(args["uri_root"]).parent
    return None


@contextlib.contextmanager
def _linked(folder: Path) -> Iterator[Path | None]:
    """The files of a folder at this moment, by hard links beside it; None where there is none."""
    if not folder.is_dir():
        yield None
        return
    for stale in folder.parent.glob(f".{folder.name}.*{PART}"):  # of one that was killed
        if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(stale, ignore_errors=True)
    copy = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{PART}")
    try:
        _link_tree(folder, copy)
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _link_tree(folder: Path, copy: Path) -> None:
    copy.mkdir(mode=0o700)
    # what comes last in a folder's life is linked first: a status, then what it promises
    for entry in sorted(os.scandir(folder), key=lambda e: e.name not in ("meta", "state.json")):
        target = copy / entry.name
        with contextlib.suppress(FileNotFoundError):  # removed, or replaced, at this very moment
            if entry.is_dir(follow_symlinks=False):
                _link_tree(Path(entry.path), target)
            elif entry.is_file(follow_symlinks=False) and not entry.name.endswith(PART):
                os.link(entry.path, target)


def _of_workspace(workspace: Path) -> list[_Source]:
    """What lies in the workspace itself and cannot be made anew; folders of jobs can."""
    return [
        _Source(f"{WORKSPACE}/{path.name}", path)
        for path in sorted(workspace.iterdir())
        if path.is_file() and not path.is_symlink() and not path.name.startswith((".", *_LOGS))
    ]


def _of_kit(kit: Path) -> list[_Source]:
    """What makes a kit, by which it is checked, and its readme, whatever else lies there."""
    return [
        _Source(f"{KIT}/{name}", kit / name)
        for name in sorted({*kit_files(kit), *_BESIDE})
        if is_file(kit / name) and not (kit / name).is_symlink() and not name.endswith(PART)
    ]


def _below(folder: Path | None, name: str) -> list[_Source]:
    found = sorted(folder.rglob("*")) if folder is not None else []
    assert folder is not None or not found
    return [
        _Source(f"{name}/{path.relative_to(folder).as_posix()}", path)  # type: ignore[arg-type]
        for path in found
        if path.is_file() and not path.is_symlink() and not path.name.endswith(PART)
    ]


def _write(file: Path, sources: list[_Source]) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    sums: list[str] = []
    with os.fdopen(handle, "wb") as raw:
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for source in sources:
                try:
                    opened = source.path.open("rb")
                except FileNotFoundError:
                    continue  # it went meanwhile
                with opened:
                    sums.append(f"{_add(tar, source.name, opened)}  {source.name}\n")
            text = "".join(sums).encode()
            about = _entry(SUMS_FILE, len(text), 0o600, int(time.time()))
            tar.addfile(about, io.BytesIO(text))
        raw.flush()
        os.fsync(raw.fileno())


def _add(tar: tarfile.TarFile, name: str, opened: IO[bytes]) -> str:
    """Add a file as long as it is now; its SHA-256."""
    status = os.fstat(opened.fileno())
    reader = _Summing(opened, status.st_size)
    entry = _entry(name, status.st_size, status.st_mode & 0o770, int(status.st_mtime))
    tar.addfile(entry, reader)
    return reader.digest.hexdigest()


class _Summing(io.RawIOBase):
    """The first bytes of a file, and their SHA-256 as they are read."""

    def __init__(self, opened: IO[bytes], size: int) -> None:
        super().__init__()
        self._opened, self._left = opened, size
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        data = self._opened.read(min(size, self._left) if size >= 0 else self._left)
        self._left -= len(data)
        self.digest.update(data)
        return data


def _entry(name: str, size: int, mode: int, modified: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, mode, modified
    return entry


# ---------------------------------------------------------------------------------------- restore


def restore(
    file: Path, workspace: Path, kit: Path | None = None, provisioning: Path | None = None
) -> Backup:
    """Put an archive back, in the place of a server that never worked; all of it or nothing.

    Args:
        file: from `backup`.
        workspace: new, or without jobs and runs.
        kit: new folder for the server's kit; None: it has its kit.
        provisioning: new folder for the state of provisioning; None: not wanted.

    Raises:
        ConfigError: something is in the way (code exists).
        FederationError: code damaged-archive, or unusable-file.
    """
    for folder in (workspace / RUNS, workspace / STORAGE):
        if folder.is_dir() and any(path.is_file() for path in folder.rglob("*")):
            raise ConfigError(
                f"a server has worked in {workspace}, and {folder} is not empty",
                "restore into a new volume or folder: docker compose down -v removes this one, "
                "with all that is in it",
                code="exists",
            )
    wanted = {WORKSPACE: workspace, KIT: kit, PROVISIONING: provisioning}
    for new in (kit, provisioning):
        if new is not None and new.exists() and any(new.iterdir()):
            raise ConfigError(f"{new} is not empty", "name a new folder", code="exists")
    scratch = {
        name: place / f".restore.{secrets.token_hex(4)}{PART}"
        for name, place in wanted.items()
        if place is not None
    }
    try:
        _extract(file, scratch)
        for name, part in scratch.items():
            place = wanted[name]
            assert place is not None  # only those are in it
            for entry in sorted(part.iterdir()) if part.is_dir() else ():
                target = place / entry.name
                if target.is_dir():
                    shutil.rmtree(target)  # empty, as was seen above
                entry.replace(target)
    except Undecodable as error:
        raise _damaged(file, error.problem) from None
    except OSError as error:
        raise FederationError(
            f"{file} could not be restored: {error.strerror or error}",
            "look whether this user may read the archive and write the folders, and for room",
            code="unusable-file",
        ) from None
    finally:
        for part in scratch.values():
            shutil.rmtree(part, ignore_errors=True)
    runs = sum(1 for _ in (workspace / RUNS).glob("*/job.json"))
    jobs = sum(1 for _ in (workspace / STORAGE).rglob("meta"))
    return Backup(file, file.stat().st_size, runs, jobs)


def _extract(file: Path, scratch: dict[str, Path]) -> None:
    """Write the members of the wanted parts, and compare all members with their sums."""
    found: dict[str, str] = {}
    listed: dict[str, str] | None = None
    for member in tar_members(file, "it", max_entries=_MAX_FILES):
        parts = PurePosixPath(member.name).parts
        if member.name in found or (member.name == SUMS_FILE and listed is not None):
            raise _damaged(file, f"{short(member.name)} is there twice")
        if member.name == SUMS_FILE:
            lines = member.text(_MAX_SUMS_BYTES).splitlines()
            listed = {line[66:]: line[:64] for line in lines}
            continue
        if len(parts) < 2:
            raise _damaged(file, f"{short(member.name)} is in no folder")
        part = scratch.get(parts[0])
        target = part.joinpath(*parts[1:]) if part is not None else None
        found[member.name] = _copy(member.blocks(), target, member.mode)
    if listed != found:
        wrong = [n for n in {*(listed or {}), *found} if (listed or {}).get(n) != found.get(n)]
        raise _damaged(file, f"{sorted(wrong)[0] if wrong else 'it'} is not what was written")


def _copy(blocks: Iterable[bytes], target: Path | None, mode: int) -> str:
    digest = hashlib.sha256()
    output = None
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o770)
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & 0o770 | 0o600)
        output = os.fdopen(handle, "wb")
    try:
        for block in blocks:
            digest.update(block)
            if output is not None:
                output.write(block)
        if output is not None:
            output.flush()
            os.fsync(output.fileno())
    finally:
        if output is not None:
            output.close()
    return digest.hexdigest()


def _damaged(file: Path, why: str) -> FederationError:
    return FederationError(
        f"{file} is damaged or no archive of fedfms backup: {why}",
        "copy it again from where it was made, or take an older one; nothing was changed here",
        code="damaged-archive",
    )
