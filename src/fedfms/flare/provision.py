"""Run FLARE's provisioner: from a project to keys, certificates and startup kits.

The only place that does, for kits of real sites and for simulations alike.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CtxKey
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner

from fedfms.errors import FederationError


def run_provisioner(project: Mapping[str, Any], folder: Path) -> Path:
    """Make the startup kits of a project.

    FLARE keeps what it made in `folder/<project>/state/`, the certificate authority's private key
    among it, and makes no key or certificate twice. What it writes is for this user only.

    Args:
        project: the content of a project.yml; it is not changed.
        folder: FLARE's workspace; is made where it is missing.

    Returns:
        the folder with one folder for each participant, `folder/<project>/prod_NN`.

    Raises:
        FederationError: FLARE could not make them, with its reason.
    """
    wanted = copy.deepcopy(dict(project))  # FLARE adds to it
    said = io.StringIO()
    with private_files(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            context = Provisioner(str(folder), prepare_builders(wanted)).provision(
                prepare_project(wanted)
            )
        except (ValueError, RuntimeError, TypeError, ImportError) as error:
            raise _not_made(str(error)) from error
    made = context.get(CtxKey.CURRENT_PROD_DIR)
    if context.get(CtxKey.BUILD_ERROR) or not made:
        raise _not_made("\n".join(context.get(CtxKey.ERRORS, [])) or said.getvalue().strip())
    return Path(made)


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Files and folders made within are for this user only; FLARE makes its own for everybody."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _not_made(reason: str) -> FederationError:
    return FederationError(
        "FLARE could not make the startup kits", reason or "no reason was given", code="provision"
    )
