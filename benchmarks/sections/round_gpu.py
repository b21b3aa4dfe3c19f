"""What is around a step on a GPU: kernels, graphs, the loader, scores, the memory plan."""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from memory_plan import GPU_CONFIGURATIONS, OVER, UNDER, Configuration
from memory_plan import measure as measure_plan
from paired import Answer, Figure, alternate, figure

from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.models.attention import _folded_split, _Tiled
from fedfms.models.build import build_model
from fedfms.models.gpu.attention import OwnAttention
from fedfms.training import loop
from fedfms.training.device import free_unused_memory

TITLE = "The round on a GPU"
ABOUT = (
    "ViT-B at 1024 pixels, FedMSA. Attention alone is one global block of 4 pictures, forward and "
    "backward; a graph is against the same step launched kernel by kernel; a round with its loader "
    "against its step alone, over phantoms; scores are of a whole `evaluate`. The "
    "plan's prediction is over the peak of torch's allocator."
)
KIND = "gpu"
LIMIT_S = 2.8 * 60  # what does not fit is left out, and said
LEAST_IMAGES = 40.0  # a second, scored
CASES, DEPTH = 10, 12  # of the phantoms
DEVICE, BACKBONE, SIZE = "cuda:0", "vit_b", 1024


def measure(pairs: int) -> list[Figure]:
    """One thing after the other, as long as there is time."""
    began, figures = time.monotonic(), []
    for what in (_round_and_scores, _plans, _kernels, _graphs):
        if time.monotonic() - began > LIMIT_S - 30:
            print(f"bench: no time left for {what.__name__.strip('_')}", file=sys.stderr)
            continue
        figures += what(pairs)
        _emptied()
    return figures


def _emptied() -> None:
    gc.collect()
    free_unused_memory()


def _seconds(function: Callable[[], Any], times: int = 1) -> Answer:
    _wait()
    began = time.perf_counter()
    for _ in range(times):
        function()
    _wait()
    return {"seconds": (time.perf_counter() - began) / times}


def _wait() -> None:
    if DEVICE != "cpu":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------- kernels


def _kernels(pairs: int) -> Iterator[Figure]:
    """Our attention against what runs without it, for blocks and for windows."""
    for (grid, heads), name in itertools.product(((64, 48), (14, 1200)), ("bf16", "tf32", "fp32")):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
        shapes = [(3, heads, grid**2, 64), (grid, grid, 64), (grid, grid, 64)]
        given = [
            torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_() for shape in shapes
        ]
        weights = torch.randn(shapes[0][1:], device=DEVICE, dtype=dtype)

        def run(form: Any, given: Any = given, weights: Any = weights) -> Answer:
            def once() -> None:
                torch.autograd.grad(form(*given, 0.125), given, weights)

            return _seconds(once, 5)

        other, form = ("tiled", _Tiled.apply) if name == "fp32" else ("folded", _folded_split)
        sides = {
            other: lambda run=run, form=form: run(form),
            "own": lambda run=run: run(OwnAttention.apply),
        }
        try:
            alternate(sides, 2)
            turns = alternate(sides, 2 * pairs)
        except (RuntimeError, ImportError, OSError) as error:
            print(f"bench: our kernel in {name} at {grid}: {error}", file=sys.stderr)
            continue
        yield figure(
            f"attention {name}, {grid} x {grid}: {other} / our kernel",
            "speed, wall s",
            *([turn["seconds"] for turn in turns[side]] for side in (other, "own")),
            least=1.0 if grid == 64 else None,
        )


# ----------------------------------------------------------------------------------------- graphs


def _graphs(pairs: int) -> Iterator[Figure]:
    """The whole step with a graph and without."""
    from step_worker import make_recipe, pictures

    for count in (1, 4):
        recipe = make_recipe("fedmsa", "bf16", count, SIZE, BACKBONE)
        images, target = pictures(recipe)
        given = {"image": images, "target": target, "annotated": torch.ones(count, 1)}
        batch = {name: one.to(DEVICE) for name, one in given.items()}
        sides = {name: _step(recipe, batch, name == "graph") for name in ("launched", "graph")}
        alternate(sides, 4)
        turns = alternate(sides, 2 * pairs)
        yield figure(
            f"step bf16, {count} at once: launched / graph",
            "speed, wall s",
            *([turn["seconds"] for turn in turns[side]] for side in ("launched", "graph")),
            least=1.0,
        )
        del sides
        _emptied()


def _step(
    recipe: Recipe, batch: dict[str, torch.Tensor], graph: bool, model: Any = None
) -> Callable[[], Answer]:
    model = _network(recipe) if model is None else model
    optimizer = loop.adam(model, recipe)
    gradient = loop.graphed(model, torch.device(DEVICE)) if graph else None

    def once() -> None:
        loop.train_step(
            *(model, optimizer, batch, recipe, len(batch["image"]), Control()),
            gradient=gradient or loop.accumulate_gradients,
        )

    return lambda: _seconds(once)


def _network(recipe: Recipe) -> Any:
    from fedfms.models.build import hold_frozen
    from fedfms.training.device import set_products

    model = build_model(recipe, None).to(DEVICE).train()
    hold_frozen(model)
    set_products(recipe, torch.device(DEVICE))
    return model


# ------------------------------------------------------------------------------- round and scores


def _round_and_scores(pairs: int) -> Iterator[Figure]:
    """A round's steps against the step alone; images that `evaluate` scores in a second."""
    from step_worker import make_recipe

    from fedfms.training.evaluate import evaluate

    device, recipe = torch.device(DEVICE), make_recipe("fedmsa", "bf16", 4, SIZE, BACKBONE)
    recipe = recipe.with_values({"paper_compat": False, "local_epochs": 2}, "the benchmark")
    with tempfile.TemporaryDirectory() as name:
        site, training = _phantoms(Path(name))
        model = _network(recipe)
        dataset = loop.SliceDataset(training, site, recipe)
        loader = loop.Loader(dataset, recipe, site, device)
        times: list[float] = []

        def whole_round() -> Answer:
            times.clear()
            loop.train_round(
                model,
                dataset,
                recipe,
                site,
                round_number=0,
                optimizer=None,
                control=Control(lambda *_: times.append(time.perf_counter())),
                loader=loader,
            )
            steps = [b - a for a, b in itertools.pairwise(times)]
            return {"seconds": statistics.median(steps[3:])}  # the first are not graphs yet

        batch = next(iter(loader.batches(loop.ShuffledBatches(len(dataset), recipe, 0))))
        assert batch is not None
        sides = {"round": whole_round, "alone": _step(recipe, batch, True, model.train())}
        alternate(sides, 4)
        turns = alternate(sides, pairs)
        yield figure(
            "a step in a round, with its loader / alone",
            "wall s",
            *([turn["seconds"] for turn in turns[side]] for side in ("round", "alone")),
            most=1.1,
        )
        del sides, batch
        _emptied()
        slices = sum(len(case.images) for case in training)
        evaluate(model, training[:1], recipe, site, Control())
        found = [
            slices / _seconds(lambda: evaluate(model, training, recipe, site, Control()))["seconds"]
            for _ in range(3)
        ]
        yield figure(
            "evaluate bf16 / what is wanted",
            "images/s",
            found,
            [LEAST_IMAGES] * len(found),
            least=1.0,
        )


def _phantoms(folder: Path) -> tuple[Any, list[Any]]:
    """A site of volumes on disk, and its training cases."""
    import yaml

    from fedfms.contracts.site import SiteConfig
    from fedfms.data.manifest import find_cases
    from fedfms.data.prepare import prepare_cases
    from fedfms.local.synthetic import CLASS_NAME, write_phantom_site

    write_phantom_site(folder / "site", "bright", cases=CASES, slices=DEPTH, seed=1)
    path = folder / "site/site.yml"
    values = yaml.safe_load(path.read_text())
    values["classes"] = {"lesion": values["classes"][CLASS_NAME]}
    values.update({"device": DEVICE, "threads": None, "min_cases": 1})
    values.pop("workers", None)
    path.write_text(yaml.safe_dump(values))
    site = SiteConfig.from_yaml(path)
    cases = prepare_cases(find_cases(site), site, Control())
    return site, [case for case in cases if case.case.split == "train"]


# ------------------------------------------------------------------------------------------ plans


def _plans(pairs: int) -> Iterator[Figure]:
    """Six configurations, three processes at a time; a peak is counted, so that one is enough."""

    def one(configuration: Configuration) -> dict[str, Any]:
        return measure_plan(configuration, None, DEVICE)

    with ThreadPoolExecutor(3) as pool:
        for configuration, found in zip(
            GPU_CONFIGURATIONS, pool.map(one, GPU_CONFIGURATIONS), strict=True
        ):
            what = (
                f"{configuration.method} {configuration.backbone} {configuration.image_size}, "
                f"{configuration.batch_size} in {configuration.precision}"
            )
            if "error" in found:
                print(f"bench: plan of {what}: {found['error']}", file=sys.stderr)
                continue
            yield figure(
                f"plan {what}: prediction / peak",
                "memory, GB",
                [found["predicted"] / 1e9],
                [found["peak"] / 1e9],
                least=1 / UNDER,
                most=OVER,
            )
