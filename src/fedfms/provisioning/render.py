"""The files of a kit that are plain text: read from templates/, placeholders filled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fedfms import __version__
from fedfms.errors import ConfigError
from fedfms.provisioning.project import check_site_name

TEMPLATES = Path(__file__).parent / "templates"
EXAMPLE_HOST, EXAMPLE_PORT = "server.example.org", 8002

# what a site owns, and may have before there is a kit for it
SITE_FILES = (
    *("env", "compose.yml", "compose.gpu.yml", "site.yml", "checkpoints/README.md"),
    *("policy/privacy.json", "policy/authorization.json"),
)


def write_templates(
    kind: Literal["site", "server", "admin", "archive"],
    folder: Path,
    only: tuple[str, ...] | None = None,
    settings: Mapping[str, str] | None = None,
    **values: object,
) -> None:
    """Write the templates of a kind of kit into a folder; a script can be run.

    Args:
        kind: a folder of templates.
        folder: gets them.
        only: of these templates; None: of all.
        settings: names of `.env` that are set in it, with their values; the others are comments.
        values: what stands for a placeholder, such as site for `__SITE__`.
    """
    root = TEMPLATES / kind
    values["version"] = __version__
    for source in sorted(path for path in root.rglob("*") if path.is_file()):
        name = source.relative_to(root).as_posix()
        if only is not None and name not in only:
            continue
        text = source.read_text(encoding="utf-8")
        for placeholder, value in values.items():
            text = text.replace(f"__{placeholder.upper()}__", str(value))
        for setting, value in (settings or {}).items() if name == "env" else ():
            text = text.replace(f"# {setting}=\n", f"{setting}={value}\n")
        # a file that begins with a dot is easily lost on its way into a package
        target = folder / (".env" if name == "env" else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        if target.name == ".env":
            target.chmod(0o600)  # a proxy's password may come to stand in it
        if text.startswith("#!"):
            target.chmod(target.stat().st_mode | 0o100)


def new_site(name: str, folder: Path) -> None:
    """Write the files that a site owns, into a new folder.

    Raises:
        ConfigError: the folder is there already, or the name cannot be used.
    """
    check_site_name(name)
    if folder.exists():
        raise ConfigError(
            f"{folder} is there already", "name a new folder; no file is overwritten", code="exists"
        )
    write_templates(
        "site",
        folder,
        SITE_FILES,
        site=name,
        server_host=EXAMPLE_HOST,
        server_port=EXAMPLE_PORT,
        project="fedfms",
    )
