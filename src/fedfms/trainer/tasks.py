"""What the trainer does with one task, from the received tensors to what passes the door."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedfms import __version__
from fedfms.contracts.contribution import Contribution
from fedfms.contracts.messages import Task
from fedfms.contracts.policy import POLICY_FILE, Policy
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Compute, SiteConfig
from fedfms.control import Control
from fedfms.data.cache import StoredCase
from fedfms.data.features import FeatureFolder, case_name, forget_job, forget_others
from fedfms.data.left_out import LeftOut
from fedfms.data.manifest import find_whole_cases, training_patients
from fedfms.data.memory import CACHE_FOLDER, FEATURES_FOLDER, GIB
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import DoorClosed, TrainerError, TrainingError
from fedfms.exchange.averaging import weight_of
from fedfms.exchange.bounds import (
    check_drawn,
    check_patients,
    check_showing,
    check_steps,
    read_policy,
)
from fedfms.exchange.door import check_job, pass_door, pass_pictures
from fedfms.exchange.tensors import difference, from_wire, shapes_of, update_norm
from fedfms.files import NO_ROOM, append_whole
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.segmenter import Segmenter
from fedfms.models.travelling import (
    read_shared_at_first,
    read_staying,
    read_travelling,
    shared_at_first,
    staying_names,
    write_shared_at_first,
    write_staying,
    write_travelling,
)
from fedfms.trainer.at_work import AtWork
from fedfms.trainer.budget import Budget
from fedfms.trainer.canary import FewCases, MadeUp, few_cases, few_steps, memory_refused, rehearsal
from fedfms.trainer.errors import ERRORS, forget_errors
from fedfms.trainer.history import HISTORY_FILE, History, Request
from fedfms.trainer.kept import KeptRun, Learnt, Outcome, request_key
from fedfms.trainer.listed import Listing, forget_withdrawn, list_prepared
from fedfms.trainer.ranks import Ranks
from fedfms.trainer.secret import part_of, site_secret
from fedfms.trainer.sums import PEERS, Sums
from fedfms.trainer.telling import Telling
from fedfms.training.device import (
    failures_explained,
    free_unused_memory,
    ready_device,
    torch_device,
)
from fedfms.training.evaluate import CaseScore, evaluate
from fedfms.training.frozen import space_of
from fedfms.training.interrupt import in_turn
from fedfms.training.loader import Loader
from fedfms.training.loop import RoundResult, adam, train_round
from fedfms.training.meter import Meter
from fedfms.training.overlay import site_pictures
from fedfms.training.plan import Plan, planned
from fedfms.training.ranks import RoundOfRanks, rank_devices

log = logging.getLogger(__name__)

SCORES_HEAD = "round,model,case,class,dice,iou,hd95\r\n"  # of a table of csv's default dialect
MAX_UNWRITTEN = 200  # evaluations whose scores are held in memory while the disk is full

Received = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFolders:
    """Where a site keeps what its trainer needs."""

    name: str  # of the site in the federation
    config: Path  # site.yml
    policy: Path  # folder with privacy.json
    data_root: Path | None  # goes before site.yml's own
    checkpoints: Path | None  # folder of SAM checkpoints; none is needed for vit_demo
    work: Path  # private: prepared cases, scores per case, full error texts with file names
    # the order of slices follows from the recipe's seed alone, which everybody knows: for runs on
    # one machine that are to come out equal; not at a hospital
    order_from_seed: bool = False
    peers: Path | None = None  # the trainers of other sites; None: policy/peers.json


@dataclass(slots=True)
class _Job:
    """What is kept in memory between the rounds of one job."""

    name: str
    kept: KeptRun  # on disk
    recipe: Recipe
    site: SiteConfig
    model: Segmenter
    cases: list[StoredCase] | None = None
    listing: Listing | None = None  # that they are of
    left_out: LeftOut | None = None  # of the site's cases, those that cannot be used
    few: FewCases | None = None  # of a canary, which has no others
    dataset: SliceDataset | None = None  # of the training cases
    loader: tuple[SliceDataset, Loader] | None = None  # its processes stay for all rounds
    trained: int | None = None  # the last round that the model and this object learnt in
    optimizer: torch.optim.Optimizer | None = None  # with `optimizer_state: keep`
    # what eight bits took from its differences until now; it is added to the next one
    unsent: dict[str, Tensor] = field(default_factory=dict)
    # what was shared at first and is this site's own now; none before
    own: dict[str, Tensor] = field(default_factory=dict)
    learnt: str = ""  # the request of which these and what stays are; empty: of none
    plan: Plan | None = None  # of memory, where it trains here
    micro_batch: int | None = None  # of the plan, and then what fitted in the last round


class TaskRunner:
    """Does one task after the other for one site; remembers the job between its rounds."""

    def __init__(self, folders: SiteFolders) -> None:
        self.folders = folders
        self.stall_seconds = 3600.0  # the site's own, from the moment its site.yml was read
        self.policy: Policy | None = None  # as the last task read it
        self._job: _Job | None = None
        self._ranks: Ranks | None = None  # processes that train beside this one
        self._unwritten: list[tuple[Path, str]] = []  # rows of scores, and the table's file
        self._secret: bytes | None = None  # the site's, and its history, from the first task on
        self._history: History | None = None
        self._at_work = AtWork(folders.work)
        self.sums = Sums(folders.name, folders.work, folders.peers or folders.policy / PEERS)
        if folders.order_from_seed:
            log.info("the order of slices follows from the recipe's seed: no secret, a simulation")

    def run(self, task: Task, received: Received, control: Control) -> Outcome:
        """Evaluate the received model where it is due, train one round where asked, pass the door.

        The site's configuration and policy are read anew for each task.

        Args:
            task: what to do.
            received: gives the model's travelling tensors; called after the policy agreed.
            control: checked between micro-batches.

        Raises:
            FedfmsError: whatever is wrong with the site's files or the task; nothing leaves then.
        """
        try:
            with failures_explained():
                if task.recipe.canary:
                    return self._canary(task, received, control)
                return self._run(task, received, control)
        except BaseException:
            self.release()  # half a round is no state to go on from
            raise

    def _canary(self, task: Task, received: Received, control: Control) -> Outcome:
        """As any task, on few cases; nothing of it is kept, and what leaves are zeros."""
        site = SiteConfig.from_yaml(self.folders.config, self.folders.data_root)
        log.info(
            "a canary (%s): zeros leave, whatever is computed; the network sees made-up pictures",
            task.kind,
        )
        try:
            with memory_refused(torch_device(site)):
                return self._run(task, received, control)
        finally:
            self._job = None
            free_unused_memory()

    def release(self) -> None:
        """Give back what is held in memory between rounds; the next task begins from the disk."""
        self._job = None
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        free_unused_memory()

    def forget(self, job: str) -> None:
        """Remove what is kept of a job: answers, optimizer, features, scores by case, errors.

        Prepared images are the site's, not a job's, and stay.

        Raises:
            OSError: something could not be removed.
        """
        if self._job is not None and self._job.name == job:
            self.release()
        KeptRun(self.folders.work, job).forget()
        forget_job(self.folders.work / FEATURES_FOLDER, job)
        self.sums.forget(job)
        (self.folders.work / "scores" / f"{job}.csv").unlink(missing_ok=True)
        forget_errors(self.folders.work / ERRORS, job)

    def _run(self, task: Task, received: Received, control: Control) -> Outcome:
        recipe = task.recipe
        site = SiteConfig.from_yaml(self.folders.config, self.folders.data_root)
        self.stall_seconds = site.stall_seconds
        self.policy = None  # a page must not show rules that hold no more
        self.policy = policy = read_policy(self.folders.policy)
        is_holdout = self.folders.name in recipe.holdout
        trains = task.kind == "train" and not is_holdout
        own = recipe.at(self.folders.name)  # by which it trains
        check_job(policy, own, trains=trains)
        _check_task(task, self.folders.name)
        _check_device(recipe, site)
        meter = Meter(ready_device(site))

        sent = from_wire(received())
        kept = KeptRun(self.folders.work, task.job)
        key = request_key(task, sent, self.folders.config, self.folders.policy / POLICY_FILE)
        is_canary = recipe.canary
        if not is_canary and (answer := kept.answer(task, key)) is not None:
            log.info("%s of round %d was answered before: the same again", task.kind, task.round)
            return answer
        if trains and recipe.sums_only:
            self.sums.check(task.job, task.round)
        budget = Budget(self.folders.work)
        if trains:
            budget.check(policy, recipe, recipe.rounds - task.round)
        if is_canary and (self.folders.work / HISTORY_FILE).exists():
            self._of_this_site().check_run(policy, recipe, trains=trains)
        is_due = task.kind == "evaluate" or recipe.evaluates(task.round)
        history = request = None  # a canary, of which zeros leave, is no part of it
        if not is_canary:
            history = self._of_this_site()
            request = history.request(task, sent, trains=trains, evaluates=is_due)
            history.check(policy, request)
            draws = policy.noise_std > 0 or recipe.patient_rate is not None
            if draws and history.was_answered(request):
                raise _no_new_noise(task)
            if trains and recipe.sums_only and history.was_answered(request):
                raise _no_second_sum(task)
        with meter("prepare"):
            job = self._job_for(task, site, kept, control)
            cases = self._prepared(job, control, policy if trains else None)
        training = [case for case in cases if case.case.split == "train"]
        if trains and job.few is not None:
            self._judge_few(job.few, job, policy, control)
        elif trains:
            if job.dataset is None:
                job.dataset = SliceDataset(training, site, recipe)
            _judge(policy, recipe, job.dataset)
        if trains and job.plan is None:
            killed = self._at_work.killed_plan(task.job)
            job.plan = planned(job.model, recipe, site, torch_device(site), control, killed=killed)
            job.micro_batch = job.plan.way.micro_batch
        # what fits in training fits in scoring
        scoring = dataclasses.replace(site, micro_batch=job.micro_batch or site.micro_batch)
        if history is not None and request is not None:
            state = _state_of(history, cases, policy, job, trains=trains)
            request = dataclasses.replace(request, state=state)
            history.check(policy, request)
            history.asked(request)
        # with a promise to those who train, their scores, which have no noise, stay
        all_score = is_holdout and (is_canary or not policy.limits_epsilon)
        scored = cases if all_score else [c for c in cases if c.case.split == "validation"]
        with meter("exchange"):
            write_travelling(job.model, sent)
            del sent
            if job.own and task.round >= recipe.personal_after:
                write_shared_at_first(job.model, job.own)
            before = read_travelling(job.model)
        scores: list[CaseScore] = []
        features = self._features(job, site)
        if is_due:
            with meter("evaluate"):
                scores = evaluate(job.model, scored, recipe, scoring, control, features)
                if not is_canary:
                    self._keep_scores(task, scores)
        pictures: list[bytes] = []
        if task.model == "final" and policy.pictures:  # of one model only: fewer leave the site
            with meter("evaluate"):
                pictures = site_pictures(
                    job.model, scored, scores, recipe, scoring, control, features
                )

        still: tuple[str, ...] = ()  # of what travels, what this site moves no more
        result: RoundResult | None = None
        tensors: dict[str, Tensor] = {}
        slices = 0
        a_step, steps = None, 0  # of a canary: seconds, and how many a round has
        if trains:
            with meter("train"), self._at_work.training(task, job.plan):
                if job.few is not None:
                    result, a_step, steps = few_steps(
                        job.model,
                        job.few,
                        site,
                        own,
                        control,
                        job.micro_batch,
                        folder=self.folders.work / FEATURES_FOLDER,
                    )
                else:
                    secret = self._order_of(request)
                    with self._round_of_ranks(job, task, control, secret) as ranks:
                        slices, result = _train(job, task, own, control, secret, ranks, features)
            if task.round >= recipe.personal_after:
                still = shared_at_first(job.model)
            with meter("exchange"):
                tensors = difference(read_travelling(job.model), before)
                tensors |= {name: torch.zeros_like(tensors[name]) for name in still}
        control.check()
        smallest = max(policy.min_cases, site.min_cases)
        telling = Telling.of(history, site, scored, scores, training, smallest)
        contribution = Contribution(
            site=self.folders.name,
            kind=task.kind,
            role="holdout" if is_holdout else "train",
            round=task.round,
            model=task.model,
            recipe_sha256=recipe.sha256,
            backbone_sha256=recipe.backbone_sha256,  # find_checkpoint compared it with the file
            package_version=__version__,
            training_slices=slices,
            training_cases=len(training) if trains else 0,
            evaluated_cases=len(telling.cases) if is_due else 0,
            left_out=len(job.left_out.found) if job.left_out else 0,
            left_out_by_reason=job.left_out.by_reason() if job.left_out else {},
            distance_unit=site.distance_unit,
            metrics=telling.metrics(scores, recipe),
            loss=result.loss if result and telling.loss else None,
            seconds=meter.seconds,
            peak_memory_bytes=meter.peak_memory_bytes,
            micro_batch=result.micro_batch if result else 0,
            rehearsal=rehearsal(job.few, recipe, meter, a_step, steps) if job.few else None,
        )
        leaving, report = pass_door(
            policy, site, recipe, shapes_of(before), tensors, contribution, job.unsent, still
        )
        if trains and request is not None:
            budget.add(policy, recipe, task.job, task.round)  # before anything of it is kept
            _keep_learnt(job, task, request)
        norm = report.update_norm
        if leaving and norm is None:  # the site knows it, whoever else does
            norm = _norm_of_a_part(policy, tensors, leaving)
        if leaving and recipe.sums_only:
            with meter("exchange"):
                leaving = self.sums.masked(
                    task.job,
                    task.round,
                    leaving,
                    weight_of(recipe, report),
                    recipe.secure_sum_bits,
                )
        outcome = Outcome(report, leaving, pass_pictures(policy, recipe, pictures))
        if history is not None and request is not None:
            telling.is_told(history, report)
            history.left(request, norm)
            kept.keep_answer(task, key, outcome)
        return outcome

    def _job_for(self, task: Task, site: SiteConfig, kept: KeptRun, control: Control) -> _Job:
        """The work kept from the last round, or a fresh model for a job that is new here.

        A round that was trained already begins anew from what the round before it left.
        """
        job = self._job
        if (
            job is None
            or (job.name, job.recipe) != (task.job, task.recipe)
            or (task.kind == "train" and job.trained is not None and job.trained >= task.round)
        ):
            self._job = job = None  # frees the last job's memory before the next one's is taken
            free_unused_memory()
            if not task.recipe.canary:
                kept.begin()
            find = functools.partial(find_checkpoint, task.recipe, self.folders.checkpoints)
            # gigabytes are read of the folder of a hospital, which may be a share
            (checkpoint,) = in_turn([find], control, beside=False)
            model = build_model(task.recipe, checkpoint).to(torch_device(site))
            job = _Job(task.job, kept, task.recipe, site, model)
            _go_on(job, task)
            log.info("a job that is new here: %s on %s", task.recipe.method, task.recipe.backbone)
        elif job.site != site:
            job.site, job.cases, job.listing, job.dataset = site, None, None, None
            job.plan = job.micro_batch = None  # perhaps on another device
            job.model.to(torch_device(site))
            _go_on(job, task)
        self._job = job
        return job

    @contextlib.contextmanager
    def _round_of_ranks(
        self, job: _Job, task: Task, control: Control, secret: bytes | None
    ) -> Iterator[RoundOfRanks | None]:
        """The processes that train beside this one, for one round; None where it is alone."""
        recipe, site = task.recipe, job.site
        devices = rank_devices(site, recipe)
        if len(devices) > 1 and recipe.patient_rate is not None:
            log.info("steps of patients are computed in one process: ranks does nothing here")
            devices = devices[:1]
        elif len(devices) > 1 and getattr(job.model, "frozen_blocks", None) is not None:
            log.info("what is kept of a frozen part has one reader: ranks does nothing here")
            devices = devices[:1]
        elif len(devices) > 1 and site.not_annotated_in:
            log.info("single cases lack classes, which are counted in one: ranks does nothing here")
            devices = devices[:1]
        if self._ranks is not None and (self._ranks.devices, self._ranks.site) != (devices, site):
            self._ranks.close()
            self._ranks = None
        if len(devices) < 2:
            yield None
            return
        if self._ranks is None:
            self._ranks = Ranks(devices, site)
        assert job.dataset is not None
        job.model.to(devices[0])
        with self._ranks.round(
            job.model, job.dataset, recipe, task.round, secret, control
        ) as ranks:
            yield ranks

    def _order_of(self, request: Request | None) -> bytes | None:
        """The secret of one request's order of slices; None: the order follows from the seed.

        Of another recipe, whatever differs in it, and of another model it is another order: if two
        differences of a site were equal, sums of which one has a site more would show its part.
        """
        if self.folders.order_from_seed:
            return None
        assert self._secret is not None and request is not None  # no canary, so they are there
        return part_of(self._secret, request.question)

    def _of_this_site(self) -> History:
        """What was asked of it before; its secret is read, or made, with it."""
        if self._history is None:
            self._secret = site_secret(self.folders.work)
            self._history = History(self.folders.work, self._secret)
            self._secret = part_of(self._secret, "order of slices")
        return self._history

    def _prepared(self, job: _Job, control: Control, policy: Policy | None) -> list[StoredCase]:
        """The site's cases; with a policy they are to be trained on, and have to be enough."""
        if job.recipe.canary:
            return self._few(job, control, policy)
        listing = job.listing.now(job.site) if job.listing else Listing.of(job.site)
        if policy is not None:
            check_patients(policy, training_patients(listing.cases))
        if job.cases is None or job.listing is None or not listing.is_alike(job.listing):
            if job.cases is not None:
                log.info(
                    "the site has other cases than in the round before: %d", len(listing.cases)
                )
            folder = self.folders.work / CACHE_FOLDER
            job.dataset = None
            left_out = dataclasses.replace(listing.left_out, found=[*listing.left_out.found])
            job.cases = prepare_cases(
                listing.cases, job.site, control, folder=folder, left_out=left_out
            )
            job.left_out = left_out
            with contextlib.suppress(OSError):  # the log says how many
                left_out.write(self.folders.work)
            forget_withdrawn(self.folders.work, job.cases)
            there = {case_name(case, job.site) for case in job.cases}
            forget_others(self.folders.work / FEATURES_FOLDER, there)
        if policy is not None:  # those left out are nobody's
            check_patients(policy, training_patients(case.case for case in job.cases))
        job.listing = listing
        return job.cases

    def _features(self, job: _Job, site: SiteConfig) -> FeatureFolder | None:
        """What is kept of the model's frozen part; None where it has none, or nothing is kept."""
        if job.model.frozen_blocks is None or job.recipe.canary or site.features_gib == 0:
            return None
        return FeatureFolder(
            self.folders.work / FEATURES_FOLDER,
            space_of(job.model, torch_device(site)),
            job.name,
            site.features_gib * GIB,
        )

    def _few(self, job: _Job, control: Control, policy: Policy | None) -> list[StoredCase]:
        """What the network sees in a canary, of the size of few cases."""
        if job.cases is None:
            cases, left_out = find_whole_cases(job.site)
            if policy is not None:
                check_patients(policy, training_patients(cases))
            job.few = few_cases(
                cases,
                job.site,
                job.recipe,
                control,
                is_holdout=self.folders.name in job.recipe.holdout,
                left_out=left_out,
                folder=self.folders.work / CACHE_FOLDER,
            )
            read = [job.few.middling, job.few.largest]
            list_prepared(self.folders.work, read)
            job.cases = [MadeUp.of(case, job.site, job.recipe) for case in read]
        return job.cases

    def _judge_few(self, few: FewCases, job: _Job, policy: Policy, control: Control) -> None:
        """Hold the rounds of a canary's run against the policy, as the run will.

        By the few cases where they leave no doubt; else all training cases are read.
        """
        check_drawn(policy, job.recipe, few.training_patients)
        if few.all_show and few.surely_has_steps(policy, job.site, job.recipe):
            return
        there, left_out = find_whole_cases(job.site)
        cases = [case for case in there if case.split == "train"]
        folder = self.folders.work / CACHE_FOLDER
        training = prepare_cases(cases, job.site, control, folder=folder, left_out=left_out)
        list_prepared(self.folders.work, training)
        _judge(policy, job.recipe, SliceDataset(training, job.site, job.recipe))

    def _keep_scores(self, task: Task, scores: Sequence[CaseScore]) -> None:
        """Append the scores of each case to the site's own table; it never leaves.

        A full disk costs no round: what cannot be written is held in memory until it can.
        """
        path = self.folders.work / "scores" / f"{task.job}.csv"
        text = io.StringIO(newline="")
        table = csv.writer(text)
        for score in scores:
            values = (score.dice, score.iou, score.hd95)
            table.writerow([task.round, task.model, score.key, score.class_name, *values])
        self._unwritten.append((path, text.getvalue()))
        try:
            while self._unwritten:
                _append_scores(*self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            if error.errno not in NO_ROOM:
                self._unwritten.clear()
                raise
            del self._unwritten[:-MAX_UNWRITTEN]
            log.warning(
                "the scores of each case cannot be written to %s (%s): free room on that disk; "
                "they are written with the next ones",
                path.parent,
                error.strerror,
            )


def _judge(policy: Policy, recipe: Recipe, dataset: SliceDataset) -> None:
    """Whether the policy lets a round be trained on these slices by this recipe."""
    check_showing(policy, len(dataset.showing))
    check_steps(policy, recipe, len(dataset))
    check_drawn(policy, recipe, len(dataset.patients))


def _append_scores(path: Path, rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    head = "" if path.exists() and path.stat().st_size else SCORES_HEAD
    append_whole(path, (head + rows).encode(errors="surrogateescape"), mode=0o600)


def _check_task(task: Task, site_name: str) -> None:
    """A task for another site, or one that its own recipe does not foresee, is a mistake."""
    if task.site != site_name:
        raise TrainerError(
            f"the task is for {task.site}, this trainer works for {site_name}",
            "give each site's two containers an exchange folder of their own",
            code="other-site",
        )
    rounds = task.recipe.rounds_to_run
    last = rounds - 1 if task.kind == "train" else rounds
    if task.round > last:
        raise TrainerError(
            f"round {task.round} is beyond the {rounds} rounds of the recipe",
            "submit the job again; its server and its recipe disagree",
            code="round",
        )


def _check_device(recipe: Recipe, site: Compute) -> None:
    """A job that asks for a GPU never runs on a processor, not even to evaluate."""
    if torch_device(site).type != "cuda" and recipe.require_gpu:
        raise TrainingError(
            f"the job requires a GPU, and this site computes on the CPU (device: {site.device})",
            "check the driver with nvidia-smi, start the trainer with the GPU overlay, or ask the "
            "coordinator to submit the job without --gpu",
            code="no-gpu",
        )


def _go_on(job: _Job, task: Task) -> None:
    """Put back what the last round before this task left, if there was one here."""
    job.optimizer, job.learnt, job.unsent, job.own = None, "", {}, {}
    # evaluated is with what stayed here last, whichever round the model is of
    learnt = job.kept.learnt_before(task.round if task.kind == "train" else sys.maxsize)
    if learnt is None:
        return
    own = {name for name in shared_at_first(job.model) if name in learnt.staying}
    staying = {name: one for name, one in learnt.staying.items() if name not in own}
    if staying_names(job.model):
        write_staying(job.model, staying)
        job.learnt = learnt.request
    if own:
        job.own, job.learnt = {name: learnt.staying[name] for name in own}, learnt.request
    job.trained = learnt.round
    if learnt.unsent:
        job.learnt, job.unsent = learnt.request, learnt.unsent
    if learnt.optimizer is not None and job.recipe.optimizer_state == "keep":
        job.learnt = learnt.request
        job.optimizer = adam(job.model, job.recipe)
        job.optimizer.load_state_dict(learnt.optimizer)


def _keep_learnt(job: _Job, task: Task, request: Request) -> None:
    """What learns here and never leaves, for a round that is asked for again."""
    optimizer = None if job.optimizer is None else job.optimizer.state_dict()
    if task.round >= job.recipe.personal_after:
        job.own = read_shared_at_first(job.model)
    staying = {**read_staying(job.model), **job.own}
    has_more = optimizer is not None or staying or job.unsent
    job.learnt = request.key if has_more else ""
    job.kept.keep_learnt(Learnt(task.round, staying, optimizer, request.key, job.unsent))
    job.trained = task.round


def _state_of(
    history: History, cases: Sequence[StoredCase], policy: Policy, job: _Job, *, trains: bool
) -> str:
    """A name of all at this site on which an answer depends, beside what was asked.

    What learnt here in earlier rounds and did not travel follows from the request that it is of.
    """
    site = job.site
    there = sorted(
        f"{one.case.split} {one.record.digest} {one.record.crc} {history.name(one.case.patient)}"
        for one in cases
    )
    classes = sorted((name, sorted(values)) for name, values in site.classes.items())
    settings = f"{classes} {site.keep_empty_every} {policy.clip_norm} {policy.limits_epsilon}"
    if site.void or site.not_annotated_in:  # a site without them is named as ever
        settings += f" {sorted(site.void)} {sorted((site.not_annotated_in or {}).items())}"
    if site.contrasts:  # what stands for one that the recipe names and nobody took here
        settings += f" {list(site.contrasts)} {site.missing_contrast}"
    learnt = job.learnt if trains or staying_names(job.model) or job.own else ""
    return hashlib.sha256("\n".join([settings, learnt, *there]).encode()).hexdigest()


def _norm_of_a_part(
    policy: Policy, learnt: Mapping[str, Tensor], leaving: Mapping[str, Tensor]
) -> float:
    """L2 norm of what leaves in a sum, as the site's history takes it.

    Without the recipe's own bound, which could make every other model seem to lie far from this.
    """
    within = update_norm(learnt)
    if policy.clip_norm is not None:
        within = min(within, policy.clip_norm)
    return max(within, update_norm(leaving))


def _no_new_noise(task: Task) -> DoorClosed:
    return DoorClosed(
        f"round {task.round} was answered with noise or drawn patients before, and that answer is "
        "not kept any more",
        "ask by a recipe with another seed: what is drawn twice for one difference averages out",
        code="answered-before",
    )


def _no_second_sum(task: Task) -> DoorClosed:
    return DoorClosed(
        f"what this site answered to round {task.round} is in an earlier sum",
        "ask by a recipe with another seed: two sums, of which one has a site more, show what it "
        "sent",
        code="summed-before",
    )


def _train(
    job: _Job,
    task: Task,
    own: Recipe,
    control: Control,
    secret: bytes | None,
    ranks: RoundOfRanks | None,
    features: FeatureFolder | None,
) -> tuple[int, RoundResult]:
    """One local round on the job's model, in place; the number of slices and how it went."""
    assert job.dataset is not None
    if job.loader is None or job.loader[0] is not job.dataset:
        loader = Loader(job.dataset, task.recipe, job.site, torch_device(job.site))
        job.loader = job.dataset, loader
    result = train_round(
        job.model,
        job.dataset,
        own,
        job.site,
        round_number=task.round,
        optimizer=job.optimizer,
        control=control,
        micro_batch=job.micro_batch,
        secret=secret,
        loader=job.loader[1],
        ranks=ranks,
        features=features,
    )
    job.optimizer = result.optimizer if task.recipe.optimizer_state == "keep" else None
    job.micro_batch = result.micro_batch
    return len(job.dataset), result
