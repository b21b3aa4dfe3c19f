"""What a round costs the server: peak memory and processor seconds by the number of sites.

    python benchmarks/close_round.py [--sites 2 100] [--strategy mean]

Each contribution has the 10.6 million values of FedMSA on ViT-B, in fp16 as they travel by default.
It is checked when it comes, waits
on the disk, and the round is closed over all of them, as in a job's process at the server but
without FLARE. A process of its own for each row. Prints JSON, and ends with 1 where 100 sites need
more than 1.2 times the memory of 2, or more than 20 processor seconds, or where another order of
arrival gives another bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VALUES, TENSORS = 10_607_232, 128
GROWTH, CPU_SECONDS = 1.2, 20.0  # at most, of the largest number of sites


def measure(sites: int, guard: str, strategy_name: str, backwards: bool) -> dict[str, object]:
    """One round in this process."""
    import torch

    from fedfms import __version__
    from fedfms.contracts.contribution import Contribution
    from fedfms.contracts.recipe import Recipe
    from fedfms.exchange.guard import check_contribution
    from fedfms.exchange.round_guard import RoundGuard, close_round
    from fedfms.exchange.strategies import find_strategy
    from fedfms.exchange.tensors import fingerprint, shapes_of
    from fedfms.exchange.waiting import WaitingRoom

    torch.set_num_threads(1)
    recipe = Recipe(
        method="fedmsa",
        backbone="vit_demo",
        backbone_sha256="a" * 64,
        classes=("lesion",),
        rounds=1,
        guard=guard,
        strategy=strategy_name,
    )
    first = torch.Generator().manual_seed(2**31)
    common = {
        f"part-{n:03d}": torch.randn(VALUES // TENSORS, generator=first) for n in range(TENSORS)
    }
    shapes = shapes_of(common)
    spent, order = 0.0, list(range(sites))
    with tempfile.TemporaryDirectory() as folder:
        room, waiting, slices = WaitingRoom(Path(folder) / "waiting"), {}, {}
        for number in reversed(order) if backwards else order:
            random = torch.Generator().manual_seed(number)
            sent = {
                name: ((value + torch.randn(value.shape, generator=random)) * 1e-3).half()
                for name, value in common.items()
            }
            name = f"site-{number:03d}"
            report = Contribution(
                site=name,
                kind="train",
                role="train",
                round=0,
                model="round",
                recipe_sha256=recipe.sha256,
                backbone_sha256=recipe.backbone_sha256,
                package_version=__version__,
                training_slices=50 + number % 7,
                training_cases=10,
                evaluated_cases=0,
            )
            began = time.process_time()
            taken = check_contribution(shapes, recipe, __version__, sent, report)
            waiting[name] = room.put(taken)
            slices[name] = report.training_slices
            spent += time.process_time() - began
            del sent, taken
        began = time.process_time()
        closed = close_round(RoundGuard(recipe), find_strategy(recipe), 0, slices, waiting)
        spent += time.process_time() - began
    return {
        "sites": sites,
        "guard": guard,
        "strategy": strategy_name,
        "order": "last first" if backwards else "first first",
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cpu_s": round(spent, 2),
        "found": sum(bool(one.findings) for one in closed.verdicts),
        "sha256": hashlib.sha256(fingerprint(closed.change).encode()).hexdigest()[:16],
    }


def main() -> None:
    """A process for each row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 100])
    parser.add_argument("--strategy", default="mean")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    good = True
    for guard in ("scale", "record"):
        rows = []
        for sites, backwards in [(n, False) for n in options.sites] + [(options.sites[-1], True)]:
            one = {
                "sites": sites,
                "guard": guard,
                "strategy_name": options.strategy,
                "backwards": backwards,
            }
            command = [sys.executable, __file__, "--one", json.dumps(one)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(json.dumps(rows[-1]), flush=True)
        good &= rows[-1]["peak_mb"] <= GROWTH * rows[0]["peak_mb"]
        good &= rows[-1]["cpu_s"] <= CPU_SECONDS and rows[-2]["sha256"] == rows[-1]["sha256"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
