"""The checks of `make test-gpu`, one a process: checks.py NAME DEVICE; prints {"found": TEXT}.

With DEVICE cpu they work on small pictures and the demo backbone, so that the checks themselves are
known to run. What is wrong is an AssertionError, or the error itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
NAME, DEVICE = sys.argv[1], sys.argv[2]
ON_GPU = DEVICE != "cpu"
BACKBONE, SIZE = ("vit_b", 1024) if ON_GPU else ("vit_demo", 64)
GIB = 2.0**30


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that folders are removed
    with tempfile.TemporaryDirectory(prefix="fedfms-test-gpu-") as folder:
        found = CHECKS[NAME](Path(folder))
    print(json.dumps({"found": found}))


# ------------------------------------------------------------------------------- what checks share


def recipe(method: str = "fedmsa", precision: str = "fp32", **changes: Any) -> Any:
    from fedfms.contracts.recipe import Recipe

    values: dict[str, Any] = {
        "method": method,
        "precision": precision,
        "backbone": BACKBONE,
        "backbone_sha256": "0" * 64,
        "classes": ("lesion",),
        "rounds": 2,
        "image_size": SIZE,
        "batch_size": 2,
        "learning_rate": 1e-4,
        "seed": 5,
    }
    return Recipe(**{**values, **changes})


def random_model(chosen: Any) -> Any:
    """ViT-B's geometry with random weights, none of them zero, so that no work is skipped."""
    from fedfms.models.build import build_model

    model = build_model(chosen, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or name.endswith("pos_embed") or "adapter.up" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def phantom_site(folder: Path, cases: int = 6, style: str = "bright", **changes: Any) -> Any:
    """A site of phantoms on disk, of one class; its policy lets steps of one slice out."""
    import json

    import yaml

    from fedfms.contracts.site import SiteConfig
    from fedfms.local.synthetic import CLASS_NAME, write_phantom_site

    write_phantom_site(folder, style, cases=cases, slices=2, seed=1)
    policy = folder / "policy/privacy.json"
    policy.write_text(json.dumps({**json.loads(policy.read_text()), "min_batch_size": 1}))
    path = folder / "site.yml"
    values = yaml.safe_load(path.read_text())
    values["classes"] = {"lesion": values["classes"][CLASS_NAME]}
    values.update({"device": DEVICE, "threads": None, "min_cases": 1, **changes})
    path.write_text(yaml.safe_dump(values))
    return SiteConfig.from_yaml(path)


def prepared(site: Any) -> tuple[list[Any], list[Any]]:
    """Training and validation cases."""
    from fedfms.control import Control
    from fedfms.data.manifest import find_cases
    from fedfms.data.prepare import prepare_cases

    cases = prepare_cases(find_cases(site), site, Control())
    return (
        [case for case in cases if case.case.split == "train"],
        [case for case in cases if case.case.split == "validation"],
    )


def one_round(model: Any, chosen: Any, site: Any, training: Any, **more: Any) -> tuple[Any, float]:
    """`train_round` on the device; its result, and the median milliseconds of a step."""
    from fedfms.control import Control
    from fedfms.data.slices import SliceDataset
    from fedfms.training.loop import train_round

    times: list[float] = []
    result = train_round(
        model,
        SliceDataset(training, site, chosen),
        chosen,
        site,
        round_number=0,
        optimizer=None,
        control=Control(lambda *_: times.append(time.perf_counter())),
        **more,
    )
    steps = [1000 * (b - a) for a, b in itertools.pairwise(times)]
    return result, statistics.median(steps[1:] or steps)


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def apart(first: float) -> str:
    return "equal to the last bit" if first == 0 else f"up to {first:.1e} apart"


# ------------------------------------------------------------------------------------- the checks


def devices(folder: Path) -> str:
    """Each form of `device` in a fresh process: chosen, measured, computed on."""
    code = """
import sys
from pathlib import Path
import torch
from fedfms.contracts.site import SiteConfig
from fedfms.training.device import torch_device
from fedfms.training.meter import Meter
site = SiteConfig(data_root=Path("x"), format="nifti", images="i/*", labels="l/*",
                  classes={"a": (1,)}, device=sys.argv[1])
device = torch_device(site)
meter = Meter(device)
with meter("train"):
    block = torch.ones(256 * 2**20, dtype=torch.uint8, device=device)
assert meter.peak_memory_bytes["train"] >= 256 * 2**20
print(device)
"""
    found = []
    for form in ("auto", "cuda", "cuda:0") if ON_GPU else ("auto", "cpu"):
        done = subprocess.run([sys.executable, "-c", code, form], capture_output=True, text=True)
        assert done.returncode == 0, f"device: {form}: {done.stderr.strip().splitlines()[-1]}"
        found.append(f"{form} is {done.stdout.strip()}")
    return ", ".join(found)


def model_against_cpu(method: str) -> str:
    """Logits and gradients of one picture on both; bf16 against fp32 on the CPU as well."""
    from fedfms.contracts.site import SiteConfig
    from fedfms.training.device import ready_device

    site = SiteConfig(
        data_root=Path("nowhere"),
        format="nifti",
        images="images/*",
        labels="labels/*",
        classes={"lesion": (1,)},
        device=DEVICE,
    )
    device = ready_device(site)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(1, 3, SIZE, SIZE, generator=generator)
    kept: dict[str, tuple[Any, dict[str, Any]]] = {}
    for where, precision in (("cpu", "fp32"), ("gpu", "fp32"), ("gpu", "bf16")):
        at = torch.device("cpu") if where == "cpu" else device
        model = random_model(recipe(method, precision)).to(at).train()
        logits = model(images.to(at))
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
        (logits * weights.to(at)).sum().backward()
        gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}
        kept[f"{where} {precision}"] = (logits.detach().cpu(), gradients)
    exact_logits, exact_gradients = kept["cpu fp32"]
    length = sum(float(g.double().norm()) ** 2 for g in exact_gradients.values()) ** 0.5
    found = []
    for name, most in (("gpu fp32", 1e-2), ("gpu bf16", 1e-1)):  # TF32 in convolutions, bf16
        logits, gradients = kept[name]
        off = float((logits - exact_logits).norm() / exact_logits.norm())
        wrong = sum(
            float((gradients[n] - exact_gradients[n]).double().norm()) ** 2 for n in gradients
        )
        of_gradient = wrong**0.5 / length
        found.append(f"{name[4:]} logits {off:.1e}, gradient {of_gradient:.1e} relative")
        assert off < most and of_gradient < most, found[-1]
    return "; ".join(found)


def training(folder: Path, method: str) -> str:
    """Two rounds from the same start with the same seed, in both precisions."""
    from fedfms.models.travelling import read_travelling
    from fedfms.training.device import ready_device
    from fedfms.training.meter import Meter

    site = phantom_site(folder / "site")
    cases, _ = prepared(site)
    found = []
    for precision in ("fp32", "bf16"):
        chosen = recipe(method, precision)
        trained, meter = [], Meter(ready_device(site))
        for _ in range(2):
            model = random_model(chosen)
            before = read_travelling(model)
            with meter("train"):
                result, milliseconds = one_round(model, chosen, site, cases)
            trained.append(read_travelling(model))
            assert far(trained[-1], before) > 0
        distance = far(*trained)
        assert distance < 10 * chosen.learning_rate * result.steps
        peak = meter.peak_memory_bytes["train"] / GIB
        found.append(
            f"{precision} {milliseconds:.0f} ms a step of {result.micro_batch}, peak {peak:.1f} "
            f"GiB, loss {result.loss:.3f}; the second time {apart(distance)}"
        )
    return "; ".join(found)


def own_kernels(folder: Path) -> str:
    """Our attention against the folded form: outputs, gradients and seconds."""
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
    from fedfms.models.attention import _folded_split, choose
    from fedfms.models.gpu.attention import TOLERANCE, OwnAttention, distance

    device = torch.device(DEVICE)
    found = []
    for name in ("bf16", "tf32", "fp32") if ON_GPU else ("fp32",):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
        choice = choose("cuda", dtype, 64, 64, 64, recorded=False) if ON_GPU else None
        if name == "fp32" and choice is not None and choice.way != "own":
            found.append(f"fp32 {choice.way}: {choice.why}")
            continue
        sizes = [(64, 64), (48, 48), (32, 32), (20, 27), (14, 14)] if ON_GPU else [(4, 17), (6, 6)]
        width = 64 if ON_GPU else 32
        aparts = [distance(dtype, width, *size, device, _folded_split) for size in sizes]
        assert max(aparts) < (TOLERANCE[name] if ON_GPU else 2e-6), (name, aparts)
        said = f"{name} up to {max(aparts):.1e} apart"
        if choice is not None:
            assert choice.way == "own", choice
            own, folded = (
                attention_seconds(form, dtype, device)
                for form in (OwnAttention.apply, _folded_split)
            )
            said += f", {1000 * own:.1f} ms against {1000 * folded:.1f}"
        found.append(said)
    return "; ".join(found)


def attention_seconds(form: Any, dtype: torch.dtype, device: torch.device) -> float:
    """Forward and backward of a global block of ViT-B with 4 pictures."""
    shapes = [(3, 48, 4096, 64), (64, 64, 64), (64, 64, 64)]
    given = [torch.randn(one, device=device, dtype=dtype).requires_grad_() for one in shapes]
    weights = torch.randn(shapes[0][1:], device=device, dtype=dtype)
    times = []
    for _ in range(8):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.autograd.grad(form(*given, 0.125), given, weights)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def step_graph(folder: Path) -> str:
    """A recorded gradient against the plain one, of other pictures and weights, and seconds."""
    from fedfms.control import Control
    from fedfms.models.build import hold_frozen
    from fedfms.training.device import make_ready, set_products
    from fedfms.training.gradients import accumulate_gradients
    from fedfms.training.graphed import graphed
    from fedfms.training.interrupt import interruptible
    from fedfms.training.loop import adam, train_step

    device = torch.device(DEVICE, 0)
    make_ready(device)
    found = []
    for method, precision, micro_batch, most in (
        ("fedmsa", "fp32", 2, 1e-3),
        ("fedmsa", "bf16", 1, 1e-2),
        ("fedsam", "bf16", 2, 1e-2),
    ):
        chosen = recipe(method, precision, clip_grad_norm=1.0)
        model = random_model(chosen).to(device).train()
        hold_frozen(model)
        set_products(chosen, device)
        optimizer, graph, control = adam(model, chosen), graphed(model, device), Control()
        assert graph is not None
        seconds: dict[str, list[float]] = {"plain": [], "graph": []}
        with interruptible(model, control):
            for number in range(12):
                batch = random_batch(chosen, number)
                use = accumulate_gradients if number % 2 and number > 6 else graph
                began = time.perf_counter()
                train_step(model, optimizer, batch, chosen, micro_batch, control, gradient=use)
                torch.cuda.synchronize(device)
                if number > 5:
                    kind = "graph" if use is graph else "plain"
                    seconds[kind].append(time.perf_counter() - began)
            assert graph.recorded == 1, f"nothing was recorded of {method} {precision}"
            batch, values = random_batch(chosen, 99), []
            for use in (graph, accumulate_gradients):
                optimizer.zero_grad(set_to_none=True)
                loss = use(model, batch, chosen, micro_batch, control)
                learning = [p.grad for p in model.parameters() if p.grad is not None]
                values.append((loss, torch.cat([one.flatten() for one in learning]).clone()))
        (loss, gradient), (plain_loss, plain) = values
        apart = float((gradient - plain).norm() / plain.norm())
        assert apart < most and abs(loss - plain_loss) < most * abs(plain_loss), (loss, apart)
        graph.end()
        of_graph, of_plain = (1000 * statistics.median(seconds[one]) for one in ("graph", "plain"))
        found.append(
            f"{method} {precision} {apart:.1e} apart, {of_graph:.0f} ms against {of_plain:.0f}"
        )
    return "; ".join(found)


def random_batch(chosen: Any, seed: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    count, mask = chosen.batch_size, chosen.mask_size
    return {
        "image": torch.randn(count, 3, SIZE, SIZE, generator=numbers),
        "target": (torch.rand(count, 1, mask, mask, generator=numbers) < 0.2).float(),
        "annotated": torch.ones(count, 1),
    }


def loader(folder: Path) -> str:
    """Batches on the device against those of the processor, and how many slices a second come."""
    from fedfms.data.slices import SliceDataset
    from fedfms.geometry import pixel_statistics
    from fedfms.training.device import ready_device
    from fedfms.training.loader import Loader
    from fedfms.training.loop import ShuffledBatches

    chosen, site = recipe(batch_size=4), phantom_site(folder / "site")
    training, _ = prepared(site)
    dataset = SliceDataset(training, site, chosen)
    device = ready_device(site)
    on_device = Loader(dataset, chosen, site, device)
    on_processor = Loader(dataset, chosen, site, torch.device("cpu"))
    level = 1 / torch.tensor(pixel_statistics(chosen)[1])[:, None, None]
    most, order = 0.0, ShuffledBatches(len(dataset), chosen, 0)
    pairs = zip(on_device.batches(order), on_processor.batches(order), strict=True)
    for got, expected in pairs:
        assert got is not None and expected is not None
        assert torch.equal(got["target"].cpu(), expected["target"])
        assert torch.equal(got["annotated"], expected["annotated"])
        levels = (got["image"].cpu() - expected["image"]).abs() / level
        most = max(most, float(levels.max()))
    assert most < 1.01, f"{most} levels apart"
    started, slices = time.perf_counter(), 0
    for number in range(1, 6):
        for batch in on_device.batches(ShuffledBatches(len(dataset), chosen, number)):
            assert batch is not None
            slices += len(batch["image"])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    speed = slices / (time.perf_counter() - started)
    return f"{most:.2f} levels from the processor's at most, {speed:.0f} slices/s"


def memory(folder: Path) -> str:
    """Cap this process's share of the GPU between one slice's need and a batch's."""
    from fedfms.control import Control
    from fedfms.errors import TrainingError
    from fedfms.training.device import ready_device
    from fedfms.training.evaluate import evaluate
    from fedfms.training.meter import Meter

    site = phantom_site(folder / "site")
    device = ready_device(site)
    training_cases, validation = prepared(site)
    chosen = recipe("fedmsa", batch_size=8)
    meter = Meter(device)
    with meter("one"):
        one_round(random_model(chosen), chosen, site, training_cases[:1], micro_batch=1)
    one, total = (
        meter.peak_memory_bytes["one"],
        torch.cuda.get_device_properties(device).total_memory,
    )
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.7 * one / total, device)
    model = random_model(chosen)
    result, _ = one_round(model, chosen, site, training_cases)
    assert 1 <= result.micro_batch < 8, result.micro_batch
    evaluate(model, validation, chosen, site, Control())
    del model
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * one / total, device)
    try:
        one_round(random_model(chosen), chosen, site, training_cases)
    except TrainingError as error:
        assert error.code == "out-of-memory", error
    else:
        raise AssertionError("half of what one slice needs was enough")
    return (
        f"one slice {one / GIB:.1f} GiB; with {1.7 * one / GIB:.1f} GiB a batch of 8 went on with "
        f"{result.micro_batch} at once; with {0.5 * one / GIB:.1f} GiB out-of-memory, in words"
    )


def predict(folder: Path) -> str:
    """The masks that predict writes are those that evaluate scores."""
    import nibabel
    import numpy as np
    from safetensors.torch import save_file

    from fedfms.control import Control
    from fedfms.data.manifest import find_cases
    from fedfms.models.trained import RECIPE_KEY, load_trained, whole_network
    from fedfms.predict.find import find_items
    from fedfms.predict.run import predict_items
    from fedfms.training.evaluate import evaluate

    site = phantom_site(folder / "site", cases=4)
    training_cases, validation = prepared(site)
    chosen = recipe("fedmsa", "bf16", learning_rate=1e-3, local_epochs=4)
    model = random_model(chosen)
    one_round(model, chosen, site, training_cases)
    started = time.perf_counter()
    scores = evaluate(model, validation, chosen, site, Control())
    seconds = time.perf_counter() - started
    file = folder / "model.safetensors"
    save_file(whole_network(model), file, {RECIPE_KEY: chosen.to_json()})
    items = find_items(folder / "site/images", folder / "masks", chosen)
    done = list(predict_items(load_trained(file, None), items, site))
    assert all(one.error is None for one in done), [str(one.error) for one in done]
    images = {case.key: case for case in find_cases(site)}
    largest = 0.0
    for score in scores:
        case = images[score.key]
        (mask,) = [one.item.labels for one in done if one.item.source == case.image]
        found, truth = (np.asarray(nibabel.load(path).dataobj) == 1 for path in (mask, case.label))
        both = found.sum() + truth.sum()
        dice = 2 * (found & truth).sum() / both if both else float("nan")
        if not np.isnan(score.dice):
            largest = max(largest, abs(dice - score.dice))
    slices = sum(len(case.images) for case in validation)
    assert largest < 1e-6, f"Dice of predict's masks {largest:.2g} from evaluate's"
    return f"{len(done)} images; Dice equal within 1e-6; evaluate {slices / seconds:.1f} slices/s"


@contextlib.contextmanager
def trainer(folder: Path, checkpoints: Path, **environment: str) -> Iterator[Any]:
    """`python -m fedfms.trainer` for the site in folder/site."""
    from fedfms.errors import TrainerError
    from fedfms.trainer.connection import ping

    arguments = {
        "--site": "site-1",
        "--config": folder / "site/site.yml",
        "--policy": folder / "site/policy",
        "--exchange": folder / "exchange",
        "--checkpoints": checkpoints,
        "--work": folder / "work",
    }
    log = folder / "trainer.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedfms.trainer", *map(str, sum(arguments.items(), ()))],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise AssertionError(log.read_text().strip().splitlines()[-1])
            with contextlib.suppress(TrainerError):
                ping(folder / "exchange", 1.0)
                break
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def tensors_of(model: Any) -> dict[str, Any]:
    from fedfms.models.travelling import read_travelling

    return read_travelling(model)


def random_checkpoint(folder: Path, chosen: Any) -> Any:
    """The recipe with the SHA-256 of a file of random weights in folder."""
    from safetensors.torch import save_file

    from fedfms.files import file_sha256

    folder.mkdir()
    model = random_model(dataclasses.replace(chosen, method="fedsam"))
    file = folder / "random.safetensors"
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, file)
    return dataclasses.replace(chosen, backbone_sha256=file_sha256(file))


def restart(folder: Path) -> str:
    """Two rounds by one trainer, and by two with a SIGKILL between them."""
    from fedfms.contracts.messages import Task
    from fedfms.models.build import build_model
    from fedfms.models.sam import find_checkpoint
    from fedfms.trainer.client import run_task

    phantom_site(folder / "site")
    (folder / "exchange").mkdir()
    chosen = random_checkpoint(folder / "checkpoints", recipe("fedmsa", "bf16"))
    checkpoints = folder / "checkpoints"
    start = tensors_of(build_model(chosen, find_checkpoint(chosen, checkpoints)))
    seconds = {}

    def rounds(job: str, killed: bool) -> tuple[dict[str, Any], Any]:
        sent = start
        with contextlib.ExitStack() as stack:
            stack.enter_context(trainer(folder, checkpoints))
            for number in range(2):
                task = Task(
                    kind="train", site="site-1", job=job, round=number, model="round", recipe=chosen
                )
                begun = time.monotonic()
                done = run_task(folder / "exchange", task, sent)
                seconds[job, number] = time.monotonic() - begun
                sent = {name: sent[name] + done.tensors[name].float() for name in sent}
                if number == 0 and killed:
                    stack.close()  # kills it
                    stack.enter_context(trainer(folder, checkpoints))
        return sent, done.contribution

    straight, report = rounds("straight", False)
    again, _ = rounds("again", True)
    distance = far(straight, again)
    assert distance < 100 * chosen.learning_rate
    peaks = ", ".join(
        f"{phase} {report.peak_memory_bytes[phase] / GIB:.1f} GiB {report.seconds[phase]:.1f} s"
        for phase in report.seconds
    )
    return (
        f"second round by phase: {peaks}; with a restart {seconds['again', 1]:.1f} s instead of "
        f"{seconds['straight', 1]:.1f} s, and {apart(distance)}"
    )


def pause(folder: Path) -> str:
    """A site pauses in the middle of a round: seconds until the GPU's memory is free."""
    from datetime import datetime

    from fedfms.contracts.messages import Task
    from fedfms.contracts.pause import Gate, Pause, write_pause
    from fedfms.errors import TaskAborted
    from fedfms.flare.pausing import follow_pause
    from fedfms.models.build import build_model
    from fedfms.models.sam import find_checkpoint
    from fedfms.trainer.client import run_task

    def used_gib() -> float:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.check_output(command, text=True).split()[0]) / 1024

    phantom_site(folder / "site")
    for name in ("exchange", "workspace"):
        (folder / name).mkdir()
    chosen = random_checkpoint(folder / "checkpoints", recipe("fedmsa", local_epochs=500))
    checkpoints = folder / "checkpoints"
    start = tensors_of(build_model(chosen, find_checkpoint(chosen, checkpoints)))
    os.environ["FEDFMS_EXCHANGE"] = str(folder / "exchange")
    gate, steps, peak = Gate(folder / "workspace"), 0, 0.0
    paused_at = 0.0

    def on_progress(phase: str, done: int, total: int) -> None:
        nonlocal steps, peak, paused_at
        if phase == "train" and (steps := done) >= 5 and not paused_at:
            peak = used_gib()
            paused_at = time.monotonic()
            write_pause(folder / "workspace", Pause.begin(None, datetime.now().astimezone()))

    before = used_gib()
    task = Task(kind="train", site="site-1", job="job", round=0, model="round", recipe=chosen)
    with trainer(folder, checkpoints):
        follow_pause(folder / "workspace")
        try:
            run_task(
                folder / "exchange",
                task,
                start,
                aborted=lambda: gate.pause() is not None,
                on_progress=on_progress,
            )
            raise AssertionError("the round came to its end")
        except TaskAborted:
            given_up = time.monotonic() - paused_at
        while used_gib() > before + 0.1:
            assert time.monotonic() < paused_at + 60, f"{used_gib()} GiB, {before} before"
            time.sleep(0.2)
        free = time.monotonic() - paused_at
    assert free < 30
    return (
        f"{peak:.1f} GiB at step {steps}, {before:.1f} before; given up after {given_up:.1f} s, "
        f"its memory free after {free:.1f} s"
    )


def require(folder: Path) -> str:
    """A trainer that must have a GPU starts with it, and refuses in words without it."""
    from fedfms.contracts.messages import Task
    from fedfms.errors import TrainingError
    from fedfms.models.build import build_model
    from fedfms.models.sam import find_checkpoint
    from fedfms.trainer.client import run_task
    from fedfms.trainer.connection import ping

    phantom_site(folder / "site", device="auto")
    (folder / "exchange").mkdir()
    chosen = recipe("fedmsa", backbone="vit_demo", image_size=64, require_gpu=True)
    chosen = random_checkpoint(folder / "checkpoints", chosen)
    checkpoints = folder / "checkpoints"
    with trainer(folder, checkpoints, FEDFMS_REQUIRE_GPU="1"):
        assert ping(folder / "exchange").device == "cuda"
    try:
        with trainer(folder, checkpoints, FEDFMS_REQUIRE_GPU="1", CUDA_VISIBLE_DEVICES=""):
            raise AssertionError("a trainer that must have a GPU started without one")
    except AssertionError as error:
        if "fix:" not in str(error):
            raise
    sent = tensors_of(build_model(chosen, find_checkpoint(chosen, checkpoints)))
    task = Task(kind="train", site="site-1", job="j", round=0, model="round", recipe=chosen)
    with trainer(folder, checkpoints, CUDA_VISIBLE_DEVICES=""):
        assert ping(folder / "exchange").device == "cpu"
        try:
            run_task(folder / "exchange", task, sent)
        except TrainingError as error:
            assert error.code == "no-gpu"
        else:
            raise AssertionError("a job that requires a GPU ran on the processor")
    return "starts with the GPU; refuses to start, and a job, without it; auto is the CPU then"


def commands(folder: Path) -> str:
    """The command that a person types, with the default device."""
    phantom_site(folder / "site", device="auto" if ON_GPU else "cpu")
    code = "from fedfms.cli import main; main()"
    started = time.monotonic()
    done = subprocess.run(
        [
            sys.executable, "-c", code, "train-local", "jobs/fedmsa", "--site",
            str(folder / "site/site.yml"), "--set", "classes=lesion", "--set", "rounds=1",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("round 1:")]
    return f"{line}; with everything {time.monotonic() - started:.0f} s"


def federation(folder: Path) -> str:
    """Three sites train the demo model by FLARE; what a round costs beside the sites' own work."""
    from fedfms.flare.simulate import simulate
    from fedfms.local.sites import find_sites

    for number, style in enumerate(("bright", "noisy", "inverted"), start=1):
        phantom_site(folder / f"sites/site-{number}", style=style)
    started = time.monotonic()
    simulate(
        REPOSITORY / "jobs/fedmsa",
        find_sites(folder / "sites", None),
        overrides=["classes=lesion", "rounds=3"],
        results=folder / "results",
        workspace=folder / "workspace",
        checkpoints=None,
    )
    whole = time.monotonic() - started
    from fedfms.report.collect import load_result

    rows = load_result(folder / "results").rounds
    assert len(rows) == 9 and all(row.accepted for row in rows)
    arrived = [max(row.time or 0 for row in rows if row.round == n) for n in range(3)]
    round_seconds = [b - a for a, b in itertools.pairwise(arrived)]
    own = [max(sum(row.seconds.values()) for row in rows if row.round == n) for n in (1, 2)]
    share = 1 - sum(own) / sum(round_seconds)
    assert 0 <= share < 1, (own, round_seconds)
    return (
        f"{whole:.0f} s for 3 rounds; a later round {statistics.mean(round_seconds):.1f} s, the "
        f"slowest site's own work {statistics.mean(own):.1f} s, FLARE and waiting {share:.0%}"
    )


CHECKS: dict[str, Callable[[Path], str]] = {
    "devices": devices,
    "model-fedmsa": lambda folder: model_against_cpu("fedmsa"),
    "model-fedsam": lambda folder: model_against_cpu("fedsam"),
    "train-fedmsa": lambda folder: training(folder, "fedmsa"),
    "train-fedsam": lambda folder: training(folder, "fedsam"),
    "kernels": own_kernels,
    "graph": step_graph,
    "loader": loader,
    "memory": memory,
    "predict": predict,
    "restart": restart,
    "pause": pause,
    "require": require,
    "commands": commands,
    "federation": federation,
}

if __name__ == "__main__":
    main()
