"""Where an export goes: refused early if something is there, and moved into place when whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedfms.errors import ConfigError
from fedfms.files import flush_folder, scratch_folder, whole_folder


def refuse_existing(output: Path, *, overwrite: bool, mark: Path | None = None) -> None:
    """Stop before any work if the export would take the place of something.

    Args:
        output: the file or folder that is to be written.
        overwrite: the user wants an earlier export replaced.
        mark: of a folder: a file in it that shows that it is such an export, and nothing else.

    Raises:
        ConfigError: "output-exists", or "output-is-something-else" where `overwrite` would remove
            what no export has written.
    """
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ConfigError(
            f"{output} is there already",
            "name another OUTPUT, or add --overwrite to replace it",
            code="output-exists",
        )
    replaceable = output.is_file() if mark is None else (output / mark).is_file()
    if not replaceable or output.is_symlink():
        kind = "a plain file" if mark is None else f"a folder with {mark}"
        raise ConfigError(
            f"{output} is not {kind}, so --overwrite does not replace it",
            "name another OUTPUT, or move what is there away yourself",
            code="output-is-something-else",
        )


def require_room(output: Path, size_bytes: int) -> None:
    """Stop before any work if the disk has less room than the export needs.

    Raises:
        ConfigError: "disk-full".
    """
    existing = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < size_bytes:
        raise ConfigError(
            f"the export needs {size_bytes / 1e9:.1f} GB, and the disk of {output} has "
            f"{free / 1e9:.1f} GB left",
            "make room there, or name an OUTPUT on another disk",
            code="disk-full",
        )


@contextlib.contextmanager
def whole_or_nothing(output: Path, *, folder: bool) -> Iterator[Path]:
    """An empty folder beside `output` to write into; moved into place if nothing is raised.

    Args:
        output: the file or folder that is to be there in the end.
        folder: whether the folder itself becomes `output`. Otherwise the file of the output's own
            name does, and before it the other files come to lie beside it.

    Raises:
        ConfigError: "cannot-write"; the folder is not writable, or the disk is full.
    """
    try:
        if folder:
            with whole_folder(output, replace=True) as part:
                yield part
            return
        with scratch_folder(output) as part:
            yield part
            flush_folder(part)
            for file in sorted(part.iterdir(), key=lambda path: path.name == output.name):
                file.replace(output.with_name(file.name))
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror or error}",
            "name an OUTPUT in a folder where you may write and that has room (df -h)",
            code="cannot-write",
        ) from error
