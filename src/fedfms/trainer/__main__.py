"""`python -m fedfms.trainer`: start the trainer of one site."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedfms.contracts.machine import Machine
from fedfms.errors import FedfmsError
from fedfms.user import refuse_root


def refuse_networks() -> None:
    """From now on this process cannot make a socket other than a Unix socket; for good.

    A container without network says the same from outside. Here it also keeps libraries from
    trying: pydicom's import ends in urllib3 opening a socket to see whether there is IPv6.
    """

    def only_unix(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.__new__" and arguments[1] not in (-1, socket.AF_UNIX):
            raise PermissionError("the trainer makes no network sockets")
        if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            raise PermissionError("the trainer looks up no names")

    sys.addaudithook(only_unix)


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
    add(
        "--order-from-seed",
        action="store_true",
        default=machine.order_from_seed,
        help="the order of slices follows from the recipe's seed, and not from this site's secret; "
        "for simulations (FEDFMS_ORDER_FROM_SEED)",
    )
    add(
        "--peers",
        type=Path,
        metavar="FILE",
        help="keys of other sites' trainers, for secure sums (peers.json in the policy folder)",
    )
    given = parser.parse_args(argv)
    try:
        refuse_root()
    except FedfmsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    refuse_networks()  # before the libraries are imported that would try
    from fedfms.trainer.server import serve
    from fedfms.trainer.tasks import SiteFolders
    from fedfms.training.device import require_gpu

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    try:
        require_gpu()
        folders = SiteFolders(
            name=given.site,
            config=given.config,
            policy=given.policy,
            data_root=given.data,
            checkpoints=given.checkpoints,
            work=given.work,
            order_from_seed=given.order_from_seed,
            peers=given.peers,
        )
        serve(folders, given.exchange)
    except FedfmsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    # Threads of libraries, and one that reads files for an announcement, may still be in the middle
    # of C++, which takes Python's own end for an error and aborts. Nothing is left to do here.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
