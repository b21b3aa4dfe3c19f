"""The server's guard and receipts: real kits, real components, no processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from federations import JOBS
from flare_context import JOB_ID, Engine
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode, ServerCommandKey
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.app_constant import AppConstants

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.flare.job import CONTRIBUTION, PICTURES, REASON, result_folder, training_dxo
from fedfms.flare.persistor import SafeTensorsPersistor
from fedfms.flare.receipts import RECEIPT, receipt_of
from fedfms.flare.result_guard import ResultGuard
from fedfms.flare.simulate import SERVER
from fedfms.records.schema import ContributionRecord
from fedfms.records.write import RecordWriter
from fedfms.trainer.own_key import KEY
from sealed_run import PICTURE, Site, make_kits, report_of, task_of

FEDMSA = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")
MODEL = {"w": torch.zeros(3)}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def persistor() -> SafeTensorsPersistor:
    return SafeTensorsPersistor()


@pytest.fixture
def server(tmp_path: Path, kits: Path, persistor: SafeTensorsPersistor) -> Engine:
    folder = tmp_path / "server"
    shutil.copytree(kits / SERVER / "startup", folder / "startup")
    engine = Engine(folder, "server", {"persistor": persistor, "guard": ResultGuard()})
    (engine.config_folder() / "recipe.json").write_text(FEDMSA.to_json())
    return engine


@pytest.fixture
def site(tmp_path: Path, kits: Path) -> Site:
    return Site("site-1", tmp_path, kits)


def difference(engine: Engine, seed: int = 0) -> dict[str, torch.Tensor]:
    with engine.new_context() as fl_ctx:
        shapes = engine.components["persistor"].start_model(fl_ctx)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 1e-3 * torch.randn(one.shape, generator=generator) for name, one in shapes.items()
    }


def task(kind: str, number: int) -> Task:
    return dataclasses.replace(task_of("site-1", kind, number, FEDMSA), job=JOB_ID)


def message(content: DXO, receipt: Any, number: int, sender: str = "site-1") -> Shareable:
    answer = content.to_shareable()
    if receipt is not None:
        answer.set_header(RECEIPT, json.loads(json.dumps(receipt)))
    answer.set_header(ServerCommandKey.FL_CLIENT, SimpleNamespace(name=sender))
    trains = content.data_kind == DataKind.WEIGHT_DIFF
    answer.set_header(ReservedHeaderKey.TASK_NAME, "train" if trains else "validate")
    answer.set_cookie_jar(
        {AppConstants.CONTRIBUTION_ROUND: number, AppConstants.MODEL_OWNER: "SRV_final"}
    )
    return answer


def train(site: Site, engine: Engine, number: int, seed: int = 0) -> Shareable:
    """What an honest site sends for a round."""
    tensors = difference(engine, seed)
    signed, report = site.answer(task("train", number), MODEL, tensors)
    return message(training_dxo(tensors, report), signed.get_header(RECEIPT), number)


def code_of(engine: Engine, answer: Shareable) -> str | None:
    """Why the guard refuses an answer; None where it takes it."""
    with engine.new_context() as fl_ctx:
        checked = engine.components["guard"].process(answer, fl_ctx)
    if checked.get_return_code() in (None, ReturnCode.OK):
        return None
    return str(checked.get_header(REASON)).partition("(")[2].partition(")")[0]


def test_an_honest_sites_answers_are_taken_and_keep_their_receipt(
    server: Engine, site: Site
) -> None:
    for number in range(2):
        answer = train(site, server, number)
        before = receipt_of(answer)
        assert code_of(server, answer) is None
        assert receipt_of(answer) == before is not None
    signed, report = site.answer(task("evaluate", 2), MODEL, {}, [PICTURE])
    content = DXO(DataKind.METRICS, data={CONTRIBUTION: report.to_dict(), PICTURES: [PICTURE]})
    answer = message(content, signed.get_header(RECEIPT), 2)
    assert code_of(server, answer) is None
    other = message(content, signed.get_header(RECEIPT), 2)
    from_shareable(other).data[PICTURES] = []
    other["DXO"]["data"][PICTURES] = []
    assert code_of(server, other) == "other-receipt"


def test_what_was_changed_on_its_way_is_refused(server: Engine, site: Site) -> None:
    answer = train(site, server, 0)
    receipt = answer.get_header(RECEIPT)
    dxo = from_shareable(answer)
    first = sorted(dxo.data)[0]
    bit = {name: tensor.clone() for name, tensor in dxo.data.items()}
    bit[first].view(torch.uint8).flatten()[0] ^= 1  # the lowest bit of one value
    said = dxo.get_meta_prop(CONTRIBUTION)
    lost = {**said, "loss": said["loss"] + 1e-12}
    for tensors, report in ((bit, said), (dxo.data, lost)):
        content = DXO(DataKind.WEIGHT_DIFF, data=tensors, meta={CONTRIBUTION: report})
        assert code_of(server, message(content, receipt, 0)) == "other-receipt"
    content = DXO(DataKind.WEIGHT_DIFF, data=dxo.data, meta={CONTRIBUTION: said})
    assert code_of(server, message(content, None, 0)) == "no-receipt"
    assert code_of(server, message(content, {"signed": 3}, 0)) == "no-receipt"
    assert code_of(server, message(content, receipt, 0)) is None


@pytest.mark.parametrize(
    "change",
    [
        ("signed", "receipt", "norm"),
        ("signed", "receipt", "time"),
        ("signed", "receipt", "number"),
        ("signed", "signature"),
        ("signed", "key"),
        ("signature",),
        ("certificate",),
    ],
)
def test_a_receipt_is_taken_as_it_was_signed_or_not(
    server: Engine, site: Site, kits: Path, change: tuple[str, ...]
) -> None:
    answer = train(site, server, 0)
    receipt = json.loads(json.dumps(answer.get_header(RECEIPT)))
    place: Any = receipt
    for key in change[:-1]:
        place = place[key]
    value = place[change[-1]]
    if change == ("certificate",):  # of another site of the project
        place[change[-1]] = (kits / "site-2" / "startup" / "client.crt").read_text()
    elif isinstance(value, str):
        place[change[-1]] = ("0" if value[0] != "0" else "1") + value[1:]
    else:
        place[change[-1]] = value + 1
    answer.set_header(RECEIPT, receipt)
    assert code_of(server, answer) == "receipt-signature"


def test_another_sites_receipt_and_another_jobs_are_refused(
    server: Engine, site: Site, tmp_path: Path, kits: Path
) -> None:
    tensors = difference(server)
    other = Site("site-2", tmp_path, kits)
    signed, _ = other.answer(dataclasses.replace(task("train", 0), site="site-2"), MODEL, tensors)
    report = report_of(task("train", 0), tensors)
    answer = message(training_dxo(tensors, report), signed.get_header(RECEIPT), 0)
    assert code_of(server, answer) == "receipt-signature"
    elsewhere = dataclasses.replace(task("train", 0), job="another-job")
    signed, report = site.answer(elsewhere, MODEL, tensors)
    answer = message(training_dxo(tensors, report), signed.get_header(RECEIPT), 0)
    assert code_of(server, answer) == "other-receipt"


def test_receipts_follow_one_another_also_after_a_new_process_of_the_server(
    server: Engine, site: Site
) -> None:
    first = train(site, server, 0)
    kept = receipt_of(first)
    assert code_of(server, first) is None
    again = message(from_shareable(first), kept, 0)  # FLARE sends a message twice
    assert code_of(server, again) is None
    second = train(site, server, 1)
    report = from_shareable(second).get_meta_prop(CONTRIBUTION)
    assert code_of(server, second) is None
    late = message(from_shareable(first), kept, 0)
    assert code_of(server, late) == "receipt-chain"

    with server.new_context() as fl_ctx:
        writer = RecordWriter(result_folder(fl_ctx) / "records.jsonl")
    taken = {"round": 1, "site": "site-1", "accepted": True}
    writer.write(ContributionRecord(**taken, contribution=report, receipt=receipt_of(second)))
    server.components["guard"] = ResultGuard()
    assert code_of(server, message(from_shareable(first), kept, 0)) == "receipt-chain"

    site.answer(task("train", 7), MODEL, {})  # for another run, which this server does not see
    assert code_of(server, train(site, server, 2)) is None


def test_a_log_that_was_rewritten_is_refused_and_a_new_trainer_begins_anew(
    server: Engine, site: Site
) -> None:
    for number in range(2):
        assert code_of(server, train(site, server, number)) is None
    for name in ("egress.jsonl", "egress.end"):
        shutil.copy(site.work / name, site.work / f"{name}.before")
    lost = train(site, server, 2)
    assert code_of(server, lost) is None
    for name in ("egress.jsonl", "egress.end"):  # both as they were before the last day
        shutil.move(site.work / f"{name}.before", site.work / name)
    site.restart()
    assert code_of(server, train(site, server, 3, seed=1)) == "receipt-chain"
    (site.work / KEY).unlink()
    (site.work / "egress.jsonl").unlink()
    site.restart()
    assert code_of(server, train(site, server, 3, seed=2)) is None


def test_without_a_kit_nothing_can_be_asked(
    tmp_path: Path, persistor: SafeTensorsPersistor, site: Site
) -> None:
    """FLARE's own simulator has no certificates either."""
    engine = Engine(tmp_path / "bare", "server", {"persistor": persistor, "guard": ResultGuard()})
    (engine.config_folder() / "recipe.json").write_text(FEDMSA.to_json())
    answer = train(site, engine, 0)
    del answer[ReservedHeaderKey.HEADERS][RECEIPT]
    assert code_of(engine, answer) is None
