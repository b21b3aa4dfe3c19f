"""Little distributions that tests bring: built by their own backend, unpacked as pip would."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path


def make_environment(folder: Path) -> tuple[Path, Path]:
    """A virtual environment that has all of this one's packages, and room for its own.

    Returns:
        its interpreter, and the folder where its own packages lie.
    """
    venv.create(folder, symlinks=True)
    own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    ours = [path for path in site.getsitepackages() if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})" for path in ours]
    (own / "ours.pth").write_text("\n".join(lines) + "\n")
    return folder / "bin" / "python", own


def install(source: Path, target: Path, scratch: Path) -> None:
    """Put a distribution and its entry points into a folder that is, or will be, on the path.

    Args:
        source: the folder with its pyproject.toml, which is left as it is.
        target: like pip's `--target`.
        scratch: for the build.
    """
    copy = scratch / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, scratch], cwd=copy, check=True, capture_output=True
    )
    (wheel,) = scratch.glob("*.whl")
    target.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    wheel.unlink()
