"""Runs `fedfms` many times without importing torch as often: reads one case a line from standard
input, does each in a fork with a mount namespace of its own, writes its output and exit code."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile

import fedfms.data.check  # imports torch
from fedfms.cli import main

CLONE_NEWNS = 0x00020000  # linux/sched.h


def run(case: dict, output: int) -> None:
    """In the child: mounts, environment, command; never returns."""
    code = 99
    try:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        for command in case["mounts"]:
            subprocess.run(["sh", "-c", command], check=True)
        os.environ.update(case["environment"])
        os.dup2(output, 1)
        sys.argv = ["fedfms", *case["arguments"]]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


assert fedfms.data.check
for line in sys.stdin:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            run(json.loads(line), output.fileno())
        _, status = os.waitpid(child, 0)
        output.seek(0)
        answer = {"code": os.waitstatus_to_exitcode(status), "output": output.read().decode()}
    print(json.dumps(answer), flush=True)
