"""Measure sections, write results/benchmarks.md and its plot: benchmarks/bench.py [SECTION ...].

Without names all sections of this machine's kind: those that need no GPU, or with --gpu those that
do. What other sections had is kept. Ends with 1 where a limit is not kept.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from paired import Section  # noqa: E402

RESULTS = HERE.parent / "results"


def sections() -> dict[str, ModuleType]:
    """Every file of the folder by its name, those without a GPU first."""
    names = sorted(path.stem for path in (HERE / "sections").glob("[a-z]*.py"))
    found = {name: importlib.import_module(f"sections.{name}") for name in names}
    return dict(sorted(found.items(), key=lambda one: (one[1].KIND, one[0])))


def main() -> int:
    """Measure, then write."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = sections()
    parser.add_argument("names", nargs="*", metavar="SECTION", help=", ".join(known))
    parser.add_argument("--gpu", action="store_true", help="the sections that need a GPU")
    parser.add_argument("--pairs", type=int, default=5, help="of turns, for each figure")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(known)}")
    kind = "gpu" if given.gpu else "cpu"
    names = given.names or [name for name, module in known.items() if kind == module.KIND]
    kept = given.results / "benchmarks.json"
    measured = {
        one["name"]: Section.from_dict(one)
        for one in (json.loads(kept.read_text()) if kept.exists() else [])
    }
    here, commit = machine(known[names[0]].KIND == "gpu"), revision()
    for name in names:
        print(f"bench: {name}", file=sys.stderr, flush=True)
        module = known[name]
        measured[name] = Section(
            name=name,
            title=module.TITLE,
            about=module.ABOUT,
            machine=here,
            commit=commit,
            command=f"make bench{'-gpu' if module.KIND == 'gpu' else ''} "
            + shlex.quote(f"BENCH={name} --pairs {given.pairs}"),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            figures=tuple(module.measure(given.pairs)),
        )
        in_order = [measured[one] for one in known if one in measured]
        kept.write_text(json.dumps([one.to_dict() for one in in_order], indent=1) + "\n")
        write(known, measured, given.results)
    lost = [one for name in names for one in measured[name].figures if one.kept is False]
    for one in lost:
        print(f"bench: {one.what}, {one.quantity}: {one.ratio:.2f}, limit missed", file=sys.stderr)
    return 1 if lost else 0


def revision() -> str:
    """The commit, and whether files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "of no repository"


def machine(with_gpu: bool) -> str:
    """Processor or GPU, cores, versions, and how busy it was with other things."""
    import torch

    cores = len(os.sched_getaffinity(0))
    facts = [f"{_processor()}, {cores} cores", f"Python {platform.python_version()}"]
    facts.append(f"torch {torch.__version__}")
    if with_gpu and torch.cuda.is_available():
        facts.insert(0, torch.cuda.get_device_name())
    elif torch.cpu._is_amx_tile_supported():
        facts.append("AMX")
    elif torch.cpu._is_avx512_bf16_supported():
        facts.append("AVX-512 with bf16, no AMX")
    else:
        facts.append("no bf16 units")
    return ", ".join(facts) + f", load {os.getloadavg()[0]:.1f} at the start"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# ------------------------------------------------------------------------------------------ pages


def write(known: dict[str, ModuleType], measured: dict[str, Section], folder: Path) -> None:
    """The page and the plot, of all sections that were ever measured."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` and `make bench-gpu`. Each figure is the median of the ratios of "
        "two things that were measured in turns in one run, with the interval that holds it with "
        "93 % or more. What stands for the paper's code, `benchmarks/baseline.py` says.",
        "",
        "![Ratios with their limits](benchmarks.svg)",
    ]
    for name, module in known.items():
        section = measured.get(name)
        lines += ["", f"## {module.TITLE}", "", module.ABOUT]
        if section is None:
            command = "make bench-gpu" if module.KIND == "gpu" else f"make bench BENCH={name}"
            lines += ["", f"Not measured: `{command}` on a machine that has what it needs."]
            continue
        lines += [
            "",
            f"`{section.command}`, commit {section.commit}, {section.date}; {section.machine}.",
            "",
            "| what | quantity | one | other | ratio | interval | pairs | limit | kept |",
            "|---|---|---:|---:|---:|---|---:|---|---|",
        ]
        for one in section.figures:
            limit = "" if one.least is None else f"≥ {one.least:g}"
            limit = limit if one.most is None else f"{limit} ≤ {one.most:g}".strip()
            limit += "" if one.aim is None else f", aim {one.aim:g}"
            kept = {None: "", True: "yes", False: "**no**"}[one.kept]
            lines.append(
                f"| {one.what} | {one.quantity} | {one.one:.4g} | {one.other:.4g} | "
                f"**{one.ratio:.3g}** | {one.low:.3g} to {one.high:.3g} | {one.pairs} | "
                f"{limit} | {kept} |"
            )
    (folder / "benchmarks.md").write_text("\n".join(lines) + "\n")
    _plot([measured[name] for name in known if name in measured], folder / "benchmarks.svg")


def _plot(measured: list[Section], target: Path) -> None:
    """Every figure with a limit as a bar on a logarithmic axis, its limit as a line."""
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmarks"})
    rows = [
        (f"{one.what}: {one.quantity}", one)
        for section in measured
        for one in section.figures
        if one.kept is not None
    ][::-1]
    drawing = Drawing(figsize=(9, 0.6 + 0.34 * max(1, len(rows))), layout="constrained")
    axes = drawing.subplots()
    for place, (_, one) in enumerate(rows):
        axes.barh(place, one.ratio, color="#4c78a8" if one.kept else "#c44e52", height=0.6)
        axes.plot([one.low, one.high], [place, place], color="#222222", linewidth=1.2)
        for limit in (one.least, one.most):
            if limit is not None:
                axes.plot([limit] * 2, [place - 0.4, place + 0.4], color="#e08214", linewidth=2)
        axes.annotate(f" {one.ratio:.2f}", (max(one.ratio, one.high), place), va="center", size=8)
    axes.set_yticks(range(len(rows)), [text for text, _ in rows], size=8)
    axes.set_xscale("log")
    axes.axvline(1.0, color="#999999", linewidth=0.8)
    axes.set_xlabel("ratio; orange: limit")
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    raise SystemExit(main())
