"""What FLARE tells a coordinator in words, and its commands that only print.

Read in FLARE 2.9.0 (`fuel/flare_api/`, `private/fed/server/`, `nvflare cert`). `flare_api` is
public; some of what it answers is text that was made for a person's eyes.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import JobMetaKey
from nvflare.app_common.job_schedulers.job_scheduler import DefaultJobScheduler
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.private.fed.server.sys_cmd import SystemCommandModule
from nvflare.tool.cert import cert_cli

from fedfms.bounded import decode_literal, json_object
from fedfms.errors import FederationError, Undecodable
from fedfms.flare.internals.version import Assumption, rests_on, uses

NO_ANSWER = "no responses"  # from clients; an error of every command that asks them

SILENCE = Assumption(
    f"a command that no client answers ends with an error that says '{NO_ANSWER}'",
    lambda: any(
        isinstance(text, str) and NO_ANSWER in text
        for text in SystemCommandModule.report_resources.__code__.co_consts
    ),
)
RESOURCES = Assumption(
    "report_resources gives, by site, Python's text of what the site's resource manager reported",
    lambda: uses(SystemCommandModule.report_resources, "_parse_replies", "add_row", "str"),
)
SESSION_FOLDER = Assumption(
    "a session reads startup/ of the folder that it is given",
    lambda: uses(Session.__init__, "Workspace", "isdir", "secure_load_admin_config"),
)
JOB_WORDS = Assumption(
    "a job's meta says job_deploy_detail, and in schedule_history 'TIME: REASON'",
    lambda: (
        (JobMetaKey.JOB_DEPLOY_DETAIL.value, JobMetaKey.SCHEDULE_HISTORY.value)
        == ("job_deploy_detail", "schedule_history")
        and uses(DefaultJobScheduler._update_schedule_history, "SCHEDULE_HISTORY")
    ),
)
CERT_COMMAND = Assumption(
    "nvflare cert has request and approve, and answers with --format json",
    lambda: hasattr(cert_cli, "def_cert_cli_parser") or hasattr(cert_cli, "handle_cert_cmd"),
)


# ---------------------------------------------------------------------------- a session


@rests_on(SESSION_FOLDER)
def open_session(kit: Path, admin: str, folder: Path, seconds: float) -> Session:
    """Log in with an admin's kit, which may be read-only; FLARE prints nothing.

    Args:
        folder: of this session, empty; links to the kit are made in it, and results come to it.
        seconds: how long to try.
    """
    # FLARE warns of every answer that comes after its question has timed out, and logs as an error
    # in its own words what is raised here as well
    logging.getLogger("nvflare.fuel.f3.cellnet").setLevel(logging.CRITICAL)
    for name in ("startup", "local"):
        if (kit / name).is_dir():
            (folder / name).symlink_to((kit / name).resolve())
    (folder / "transfer").mkdir(exist_ok=True)  # where FLARE puts what it fetches
    with contextlib.redirect_stdout(io.StringIO()):
        return new_secure_session(admin, str(folder), timeout=seconds)


@rests_on(SILENCE, RESOURCES)
def reported_resources(session: Session) -> dict[str, Any]:
    """What each connected site's resource manager reported, by site; without those that are silent.

    Raises:
        RuntimeError: FLARE could not ask.
    """
    try:
        said = session.report_resources("client")
    except RuntimeError as error:
        if NO_ANSWER not in str(error):
            raise
        return {}
    return {site: read_cell(cell) for site, cell in said.items()}


def read_cell(cell: Any) -> Any:
    """A value in a cell of FLARE's table, which is Python's text of it; None for any other text."""
    if not isinstance(cell, str):
        return cell
    try:
        return decode_literal(cell, "the cell")
    except Undecodable:
        return None


# ------------------------------------------------------------------------------- a job


@rests_on(JOB_WORDS)
def deploy_trouble(meta: Mapping[str, Any]) -> str:
    """Why sites do not take part in a job, as FLARE says it; the only place where it does."""
    detail = meta.get("job_deploy_detail") or ""
    texts = detail if isinstance(detail, list) else [detail]
    return "; ".join(str(text) for text in texts if text and not str(text).endswith("OK"))


@rests_on(JOB_WORDS)
def waiting_reason(meta: Mapping[str, Any]) -> str:
    """Why FLARE has not started a job yet, by its last attempt; empty before the first."""
    history = meta.get("schedule_history")
    if not isinstance(history, list) or not history:
        return ""
    return str(history[-1]).partition(": ")[2]  # after the time


def statistics_group(stats: Any, group: str) -> dict[str, Any]:
    """One group of a running job's statistics, whichever component of the server it came from."""
    for groups in stats.values() if isinstance(stats, dict) else ():
        if isinstance(groups, dict) and isinstance(groups.get(group), dict):
            return dict(groups[group])
    return {}


# ------------------------------------------------------------------------ nvflare cert


def write_authority(folder: Path, root: bytes, root_key: bytes, project: str) -> Path:
    """Make a folder as `nvflare cert init` does, of a certificate authority that is there already.

    Public API makes only new ones, and a federation has one authority.

    Returns:
        the file with the private key, to be removed after use.
    """
    folder.mkdir(mode=0o700)
    (folder / "rootCA.pem").write_bytes(root)
    key = folder / "rootCA.key"
    key.write_bytes(root_key)
    (folder / "ca.json").write_text(json.dumps({"project": project}))
    return key


@rests_on(CERT_COMMAND)
def nvflare_cert(*arguments: str, home: Path) -> dict[str, Any]:
    """Run `nvflare cert`: a process of its own, because it prints, exits, and writes into HOME.

    Raises:
        FederationError: code request-refused, with FLARE's reason.
    """
    done = subprocess.run(
        [sys.executable, "-m", "nvflare.cli", "cert", *arguments, "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(home)},
    )
    try:
        said = json_object(done.stdout.strip().splitlines()[-1], "FLARE's answer")
    except (IndexError, ValueError):
        said = {"message": done.stderr.strip() or "no reason was given"}
    if done.returncode != 0 or said.get("status") != "ok":
        detail = said.get("detail") or said.get("data", {}).get("detail") or ""
        raise FederationError(
            f"FLARE refuses: {said.get('message')} {detail}".strip(),
            str(said.get("hint") or "make a new request: fedfms request"),
            code="request-refused",
        )
    return dict(said["data"])
