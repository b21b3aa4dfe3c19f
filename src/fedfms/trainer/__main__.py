"""`python -m fedfms.trainer`: start the trainer of one site."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fedfms.config import Machine
from fedfms.errors import FedfmsError
from fedfms.trainer.server import serve


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and serve; the exit code is 2 for a mistake in what was given."""
    machine = Machine.from_environment()
    parser = argparse.ArgumentParser(
        prog="fedfms trainer",
        description="Wait for rounds and evaluations on a Unix socket. Sees the images and needs "
        "no network.",
    )
    add = parser.add_argument
    add("--site", required=True, help="name of this site in the federation")
    add("--config", required=True, type=Path, metavar="FILE", help="site.yml")
    add("--policy", required=True, type=Path, metavar="FOLDER", help="with privacy.json")
    add(
        "--exchange",
        type=Path,
        metavar="FOLDER",
        default=machine.exchange,
        required=machine.exchange is None,
        help="shared with the FLARE client (FEDFMS_EXCHANGE)",
    )
    add("--data", type=Path, metavar="FOLDER", default=machine.site_data, help="SITE_DATA")
    add(
        "--checkpoints",
        type=Path,
        metavar="FOLDER",
        default=machine.checkpoints,
        help="of SAM checkpoints (FEDFMS_CHECKPOINTS)",
    )
    add("--work", required=True, type=Path, metavar="FOLDER", help="private; scores per case")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        serve(
            given.site,
            given.config,
            given.policy,
            given.exchange,
            data_root=given.data,
            checkpoints=given.checkpoints,
            work=given.work,
        )
    except FedfmsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
