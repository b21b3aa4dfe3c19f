"""Fuzz the parsers of what other parties wrote: python tests/fuzz/run.py [TARGET …]

Each parser runs in a process of its own, guided by coverage where atheris is installed (as the lock
for development does where it has a wheel), else over changed seeds alone. It ends after so many
seconds of processor time or inputs, whichever comes first. The processes are forks of this one,
which has loaded and instrumented the package once. The table is written anew after each parser.

    python tests/fuzz/run.py --seconds 900 --inputs 1000000
    python tests/fuzz/run.py --seconds 60 request.zip recipe.json

Exit code 1: a parser raised something else than it says, took longer than ten seconds for one
input, or was ended for its memory. Such inputs lie in the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
MEMORY = 3 << 30  # bytes of address space that a parser's process may take beyond its start
_COVERAGE = re.compile(r"^#(\d+)\s.*?\bft: (\d+)", re.M)


def main() -> int:
    """Arguments in, exit code out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="parsers, by name; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time, each")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("workspace/fuzzing"))
    parser.add_argument("--list", action="store_true", help="the names, and no more")
    asked = parser.parse_args()
    atheris = _loaded()
    from targets import names

    if asked.list:
        print("\n".join(names()))
        return 0
    if unknown := set(asked.targets) - set(names()):
        parser.error(f"no parser is called {', '.join(sorted(unknown))}; see --list")
    print("guided by coverage" if atheris else "changed seeds: atheris is not here", flush=True)
    return _all(atheris, asked, asked.targets or names())


def _loaded() -> Any:
    """Load the parsers, instrumented where atheris is installed: it, else None."""
    try:
        import atheris
    except ImportError:
        return None
    # the parsers' own code and the decoders of Python that they rest on
    wanted = ["fedfms", "fedfms_lab", "yaml", "zipfile", "tarfile", "safetensors"]
    for name in ("zipfile", "tarfile"):  # loaded by now, and not instrumented
        sys.modules.pop(name, None)
    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=wanted):
        import targets  # noqa: F401 - for what it loads; it says of each module that it does
    return atheris


def _all(atheris: Any, asked: argparse.Namespace, chosen: list[str]) -> int:
    from fuzzing import table

    asked.output.mkdir(parents=True, exist_ok=True)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    tallies = []
    for name in chosen:
        file = asked.output / f"{name.replace(' ', '-')}.json"
        file.unlink(missing_ok=True)
        log = file.with_suffix(".log")
        began = time.time()
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as scratch:
            sys.stdout.flush()
            if (child := os.fork()) == 0:
                _child(atheris, name, asked, log, Path(scratch))
            _, status = os.waitpid(child, 0)
        lines = log.read_text(errors="replace")
        if not file.is_file():
            sys.exit(f"{name}: it did not begin; see {log}")
        tally = json.loads(file.read_text())
        tally["coverage"] = [[int(n), int(ft)] for n, ft in _COVERAGE.findall(lines)]
        if (code := os.waitstatus_to_exitcode(status)) != 0:
            tally["unexpected"][f"the process ended with {code}, see {log.name}"] = 1
        file.write_text(json.dumps(tally))
        tallies.append(tally)
        (asked.output / "table.md").write_text(table(tallies))
        print(
            f"{name}: {tally['inputs']:,} inputs, {tally['accepted']:,} accepted, "
            f"{time.time() - began:.0f} s, other exceptions: {len(tally['unexpected']) or 'none'}",
            flush=True,
        )
        for what, count in tally["unexpected"].items():
            print(f"  {count} x {what}", flush=True)
    print(table(tallies))
    return 1 if any(one["unexpected"] for one in tallies) else 0


def _child(
    atheris: Any, name: str, asked: argparse.Namespace, log: Path, scratch: Path
) -> NoReturn:
    """One parser, in this process, to its end."""
    code = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        _feed(atheris, name, asked, log.with_suffix(".json"), scratch)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _feed(atheris: Any, name: str, asked: argparse.Namespace, file: Path, scratch: Path) -> None:
    import fuzzing
    import targets

    with targets.opened(name, scratch) as target:
        feeder = fuzzing.Feeder(target, asked.output / "inputs")
        feeder.read_seeds()
        _bound_process(asked.seconds)
        began = time.process_time()

        def one(data: bytes) -> None:
            feeder.test(data)
            tally = feeder.tally
            over = tally.inputs >= asked.inputs or time.process_time() - began >= asked.seconds
            if over or tally.inputs % 500 == 0:
                fuzzing.save(file, tally)
            if over and atheris is not None:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)  # libFuzzer has no end of its own by processor time

        fuzzing.save(file, feeder.tally)
        if atheris is not None:
            _guided(atheris, target, one, asked, scratch)
            return
        for data in fuzzing.changed_seeds(target, asked.inputs, asked.seed):
            one(data)
            if time.process_time() - began >= asked.seconds:
                break
        fuzzing.save(file, feeder.tally)


def _guided(atheris: Any, target: Any, one: Any, asked: argparse.Namespace, scratch: Path) -> None:
    def change(data: bytes, size: int, seed: int) -> bytes:
        if seed % 3 == 0:
            return atheris.Mutate(data, size)
        first = data if seed % 5 else random.Random(seed).choice(target.seeds)
        return target.mutate(random.Random(seed), first, target.seeds)[:size]

    corpus = scratch / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / f"{number:03d}").write_bytes(seed)
    longest = max(map(len, target.seeds))
    atheris.Setup(
        [
            *(sys.argv[0], str(corpus), f"-seed={asked.seed}", "-rss_limit_mb=0", "-timeout=99999"),
            *(f"-max_len={max(4 * longest, 4096)}", "-len_control=0", "-print_final_stats=0"),
            *("-reload=0", "-use_value_profile=0", f"-artifact_prefix={asked.output}/"),
        ],
        one,
        custom_mutator=change,
    )
    atheris.Fuzz()


def _bound_process(seconds: float) -> None:
    """A parser that takes far more than its input has gets a MemoryError, and not the machine.

    One that hangs for longer than it has in all is ended by its limit of processor time.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    processor = int(time.process_time() + 2 * seconds + 120)
    resource.setrlimit(resource.RLIMIT_CPU, (processor, processor))


if __name__ == "__main__":
    sys.exit(main())
