"""What a real trainer process computes, and what it lets out."""

from __future__ import annotations

import csv
import dataclasses
import json
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import psutil
import pytest
import torch
from trainer_process import SITE, Place, TrainerProcess, in_three_decimals

from fedfms.contracts.messages import Task, TaskFiles, TaskRequest, decode_answer, encode
from fedfms.contracts.policy import Policy
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import (
    CheckpointError,
    DoorClosed,
    FedfmsError,
    SiteDataError,
    TrainerError,
)
from fedfms.exchange.guard import check_contribution
from fedfms.exchange.pictures import is_plain_png
from fedfms.exchange.tensors import difference, save_tensors, shapes_of, update_norm
from fedfms.models.build import build_model
from fedfms.models.travelling import read_travelling, write_travelling
from fedfms.trainer.client import run_task
from fedfms.training.evaluate import evaluate, summarize
from fedfms.training.loop import train_round


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the trainer's own site.yml says: sums in the same order
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tells_of_one(shared_place: Place):
    """Its policy lets a mean leave in which something was found in one of two."""
    before = (shared_place.policy / "privacy.json").read_text()
    shared_place.set_policy(min_cases=1, pictures=True)
    yield
    (shared_place.policy / "privacy.json").write_text(before)


@pytest.mark.usefixtures("tells_of_one")
@pytest.mark.parametrize("method", ["fedmsa", "fedsam"])
def test_rounds_through_the_process_equal_rounds_by_direct_calls(
    shared_trainer: TrainerProcess,
    shared_place: Place,
    recipe: Recipe,
    checkpoints: Path,
    method: Literal["fedmsa", "fedsam"],
) -> None:
    recipe = dataclasses.replace(recipe, method=method)
    site = SiteConfig.from_yaml(shared_place.data / "site.yml")
    cases = prepare_cases(find_cases(site), site, Control())
    training = [case for case in cases if case.case.split == "train"]
    validation = [case for case in cases if case.case.split == "validation"]
    dataset = SliceDataset(training, site, recipe)
    model = build_model(recipe, checkpoints / "random.safetensors")
    optimizer = None
    sent = {name: tensor * 1.01 for name, tensor in read_travelling(model).items()}
    for number in range(2):
        task = Task(
            kind="train", site=SITE, job="equal", round=number, model="round", recipe=recipe
        )
        got = run_task(shared_place.exchange, task, sent)

        write_travelling(model, sent)
        scores = evaluate(model, validation, recipe, site, Control())
        result = train_round(
            model,
            dataset,
            recipe,
            site,
            round_number=number,
            optimizer=optimizer,
            control=Control(),
        )
        optimizer = result.optimizer
        expected = difference(read_travelling(model), sent)

        assert set(got.tensors) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(got.tensors[name], tensor, rtol=0, atol=1e-7)
        assert update_norm(expected) > 0.01  # it did learn something
        report = got.contribution
        assert report.metrics == in_three_decimals(summarize(scores, 1))
        assert report.loss == pytest.approx(result.loss, abs=6e-4)
        assert report.training_slices == len(dataset)
        assert report.training_cases == len(training) == 6
        assert report.evaluated_cases == len(validation) == 2
        assert report.update_norm == pytest.approx(update_norm(expected), rel=1e-6)
        assert set(report.seconds) == {"prepare", "evaluate", "train", "exchange"}
        assert set(report.peak_memory_bytes) == set(report.seconds)
        assert min(report.peak_memory_bytes.values()) > 50e6
        check_contribution(shapes_of(sent), recipe, report.package_version, got.tensors, report)
        sent = {name: tensor + got.tensors[name] for name, tensor in sent.items()}
    assert [p.name for p in shared_place.exchange.iterdir()] == ["trainer.sock"]


def test_a_holdout_is_scored_on_all_cases_and_returns_no_tensors(
    shared_trainer, shared_place: Place, recipe: Recipe, global_model
) -> None:
    recipe = dataclasses.replace(recipe, holdout=(SITE,))
    task = Task(kind="train", site=SITE, job="holdout", round=1, model="round", recipe=recipe)
    got = run_task(shared_place.exchange, task, global_model)
    assert got.tensors == {}
    report = got.contribution
    assert (report.role, report.training_slices, report.training_cases) == ("holdout", 0, 0)
    assert report.evaluated_cases == 8
    assert report.loss is None
    assert report.update_norm is None


def test_an_evaluation_gives_scores_and_pictures_where_the_policy_allows_them(
    shared_trainer, shared_place: Place, recipe: Recipe, global_model
) -> None:
    task = Task(kind="evaluate", site=SITE, job="eval", round=3, model="final", recipe=recipe)
    got = run_task(shared_place.exchange, task, global_model)
    assert got.tensors == {}
    assert (got.contribution.model, got.contribution.round) == ("final", 3)
    assert got.contribution.evaluated_cases == 2
    assert got.pictures
    assert all(is_plain_png(picture) for picture in got.pictures)
    shared_place.set_policy(min_cases=2)  # read anew for each task
    try:
        assert run_task(shared_place.exchange, task, global_model).pictures == []
        shared_place.set_policy(min_cases=3)
        report = run_task(shared_place.exchange, task, global_model).contribution
        assert report.metrics
        assert all(metric.mean is None and metric.cases == 0 for metric in report.metrics)
    finally:
        shared_place.set_policy(min_cases=2, pictures=True)


def test_half_precision_halves_what_travels_back(
    shared_trainer, shared_place: Place, recipe: Recipe, global_model
) -> None:
    recipe = dataclasses.replace(recipe, transfer_precision="fp16")
    task = Task(kind="train", site=SITE, job="half", round=0, model="round", recipe=recipe)
    sent = {name: tensor.half() for name, tensor in global_model.items()}
    got = run_task(shared_place.exchange, task, sent)
    assert {tensor.dtype for tensor in got.tensors.values()} == {torch.float16}
    accepted = check_contribution(
        shapes_of(sent), recipe, got.contribution.package_version, got.tensors, got.contribution
    )
    assert got.contribution.update_norm == pytest.approx(update_norm(accepted), rel=1e-6)


def test_a_policy_with_a_clip_norm_bounds_what_leaves(
    shared_trainer, shared_place: Place, train_task: Task, global_model
) -> None:
    shared_place.set_policy(min_cases=2, clip_norm=0.001)
    try:
        got = run_task(shared_place.exchange, train_task, global_model)
    finally:
        shared_place.set_policy(min_cases=2, pictures=True)
    assert update_norm(got.tensors) == pytest.approx(0.001, rel=1e-4)


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        (Policy(methods=("fedsam",)), "method-not-allowed"),
        (Policy(max_rounds=2), "too-many-rounds"),
        (None, "no-policy"),
    ],
)
def test_a_policy_that_refuses_does_so_before_anything_is_computed(
    shared_trainer, shared_place: Place, train_task: Task, global_model, policy, code: str
) -> None:
    if policy is None:
        (shared_place.policy / "privacy.json").unlink()
    else:
        shared_place.set_policy(methods=list(policy.methods), max_rounds=policy.max_rounds)
    task = dataclasses.replace(train_task, job=f"refused-{code}")
    try:
        with pytest.raises(DoorClosed, match="the trainer's own log") as caught:
            run_task(shared_place.exchange, task, global_model)
    finally:
        shared_place.set_policy(min_cases=2, pictures=True)
    assert caught.value.code == code
    assert not (shared_place.work / "scores" / f"refused-{code}.csv").exists()


def test_a_model_of_another_shape_and_a_task_for_another_site_are_refused(
    shared_trainer, shared_place: Place, train_task: Task, global_model
) -> None:
    short = dict(list(global_model.items())[1:])
    with pytest.raises(CheckpointError) as caught:
        run_task(shared_place.exchange, train_task, short)
    assert caught.value.code == "missing-tensor"
    with pytest.raises(TrainerError) as wrong:
        run_task(
            shared_place.exchange, dataclasses.replace(train_task, site="site-2"), global_model
        )
    assert wrong.value.code == "other-site"
    with pytest.raises(TrainerError) as late:
        run_task(shared_place.exchange, dataclasses.replace(train_task, round=3), global_model)
    assert late.value.code == "round"


def test_two_clients_at_once_are_served_one_after_the_other(
    shared_trainer, shared_place: Place, train_task: Task, global_model, begin
) -> None:
    both = [
        begin(shared_place, dataclasses.replace(train_task, job=job), global_model)
        for job in ("one", "two")
    ]
    for thread in both:
        thread.wait()
        assert thread.error is None
    first, second = (thread.result.tensors for thread in both)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any("waiting" in thread.phases for thread in both)


def test_no_name_of_a_case_crosses_the_socket_also_not_with_an_error(
    place: Place, start, train_task: Task, recipe: Recipe, global_model, phantoms: Path
) -> None:
    trainer = start()
    stems = [path.name.split(".")[0] for path in (phantoms / "images").iterdir()]
    assert len(stems) == 8
    evaluation = dataclasses.replace(train_task, kind="evaluate", round=3, model="final")
    crossed = b""
    for task in (train_task, evaluation):
        crossed += everything_that_crosses(place, task, global_model)
    assert b'"type":"reply"' in crossed

    images = place.data / "images"
    images.unlink()
    images.mkdir()
    for path in (phantoms / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / f"{stems[0]}.nii.gz").write_bytes(b"no image")
    crossed += everything_that_crosses(
        place, dataclasses.replace(train_task, job="x"), global_model
    )
    (images / f"{stems[0]}.nii.gz").unlink()
    crossed += everything_that_crosses(
        place, dataclasses.replace(train_task, job="y"), global_model
    )
    assert crossed.count(b'"error":"SiteDataError"') == 2

    log = (place.root / "trainer.log").read_bytes()
    for stem in stems:
        assert stem.encode() not in crossed
        assert stem.encode() not in log
    trainer.kill(15)
    # the site itself finds both, in its private folder
    assert stems[0] in (place.work / "errors.log").read_text()
    rows = list(csv.DictReader((place.work / "scores" / "job-1.csv").open()))
    assert {row["case"].split(".")[0] for row in rows} < set(stems)
    assert {row["model"] for row in rows} == {"round", "final"}


def everything_that_crosses(place: Place, task: Task, tensors) -> bytes:
    """All bytes from the trainer: every line on the socket and every file that it put down."""
    files = TaskFiles(place.exchange, secrets.token_hex(8))
    save_tensors(files.received, tensors, None)
    crossed = b""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(place.exchange / "trainer.sock"))
        stream.sendall(encode(TaskRequest(files.task_id, task)))
        for line in stream.makefile("rb"):
            crossed += line
            decode_answer(line)
            if b'"type":"progress"' not in line:
                break
        for path in place.exchange.iterdir():
            if path.is_file() and path != files.received:
                crossed += path.name.encode() + path.read_bytes()
    return crossed


def test_site_errors_arrive_with_their_code_and_without_names(
    place: Place, start, train_task: Task, global_model, phantoms: Path
) -> None:
    start()
    (place.data / "labels").unlink()
    (place.data / "labels").mkdir()
    for path in sorted((phantoms / "labels").iterdir())[1:]:
        (place.data / "labels" / path.name).symlink_to(path)
    with pytest.raises(SiteDataError) as caught:
        run_task(place.exchange, train_task, global_model)
    assert "phantom" not in str(caught.value)
    assert caught.value.code != "site-data"
    (place.data / "site.yml").write_text("data_rot: x\n")
    with pytest.raises(FedfmsError) as caught:
        run_task(place.exchange, train_task, global_model)
    assert type(caught.value).__name__ == "ConfigError"


def test_an_unforeseen_exception_crosses_by_its_class_only(
    place: Place, start, train_task: Task, global_model
) -> None:
    (place.work).mkdir()
    (place.work / "scores").write_text("in the way")  # a folder is meant to be here
    start()
    with pytest.raises(
        TrainerError, match=r"unexpected, (FileExistsError|NotADirectoryError)"
    ) as e:
        run_task(place.exchange, train_task, global_model)
    assert e.value.code == "unexpected"
    assert str(place.work) not in str(e.value)
    assert "Traceback" in (place.work / "errors.log").read_text()
    (place.work / "scores").unlink()
    assert run_task(place.exchange, train_task, global_model).tensors


def test_a_training_trainer_has_no_network_socket(
    shared_trainer: TrainerProcess, shared_place: Place, long_task: Task, global_model, begin
) -> None:
    thread = begin(shared_place, long_task, global_model)
    thread.wait_for_phase("train")
    process = psutil.Process(shared_trainer.pid)
    assert process.net_connections(kind="inet") == []
    assert {c.laddr for c in process.net_connections(kind="unix") if c.laddr} == {
        str(shared_place.exchange / "trainer.sock")
    }


@pytest.mark.parametrize(
    ("module", "strangers"),
    [
        (
            "fedfms.trainer.client",
            "nibabel PIL segment_anything scipy tifffile nvflare fedfms.models fedfms.data",
        ),
        ("fedfms.trainer.server", "nvflare grpc fedfms.flare monai scipy.stats matplotlib"),
        # of processes that live as long as the containers and see no tensor
        ("fedfms.flare.greeting", "torch numpy fedfms.models fedfms.data.cache"),
        ("fedfms.flare.keeper", "torch numpy fedfms.models fedfms.data.cache"),
        ("fedfms.flare.metrics", "torch numpy fedfms.models fedfms.data.cache"),
        ("fedfms.flare.start", "torch numpy fedfms.models fedfms.data.cache"),
        ("fedfms.flare.metrics", "torch fedfms.models fedfms.data.cache"),
        # of commands that wait for a run
        ("fedfms.flare.session", "torch fedfms.data.cache"),
        ("fedfms.flare.simulate", "torch fedfms.data.cache"),
    ],
)
def test_what_each_side_does_not_import(module: str, strangers: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(json.loads(ran.stdout))
    assert module in loaded
    assert not loaded & set(strangers.split())
