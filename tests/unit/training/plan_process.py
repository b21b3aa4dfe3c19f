"""A process that plans and trains for two steps; prints what was predicted and its peak, in bytes.

python plan_process.py fedmsa vit_demo 256 4 bf16 4 0
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from memory_plan import Configuration, train

if __name__ == "__main__":
    method, backbone, size, batch, precision, micro_batch, checkpointing = sys.argv[1:]
    found = train(
        Configuration(
            *(method, backbone, int(size), int(batch), precision),
            *(int(micro_batch), checkpointing == "1"),
        )
    )
    print(found["predicted"], found["peak"])
