"""What keeps a job from running, found before it is submitted.

FLARE takes a job that no site can run and leaves it waiting, or lets it fail in its first round
after everybody has loaded a model. Here it is compared with what the sites announce.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfms import __version__
from fedfms.bounded import read_json_object
from fedfms.contracts.announcement import PAUSED, Announcement, Slicing
from fedfms.contracts.codes import CODES
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.sums import LEAST_SITES
from fedfms.errors import ConfigError, Undecodable
from fedfms.exchange.bounds import Breach, breaches, too_few_steps
from fedfms.flare.internals.job import participants_of
from fedfms.models.methods import installed_methods
from fedfms.trainer.budget import after, epsilon_text

EVERYBODY, SERVER = "@ALL", "server"  # FLARE's names in a deploy_map
MOST_SPACING = 2.0  # times by which voxels of sites may differ without a word


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job folder of our own, ready to submit; `session.prepare_job` makes one."""

    folder: Path
    recipe: Recipe
    min_clients: int
    trains: bool

    @property
    def meta(self) -> dict[str, Any]:
        """Its meta.json."""
        return read_json(self.folder / "meta.json")


def check_sites(job: PreparedJob, connected: Sequence[str]) -> None:
    """Refuse a job that FLARE would take and never start, or that would end in its first round.

    Raises:
        ConfigError: code unknown-site or too-few-sites, or job-not-runnable for several problems.
    """
    _refuse([*_by_name(job, connected, ())])


def check_announcements(
    job: PreparedJob,
    told: Sequence[Announcement],
    without: Sequence[str] = (),
    *,
    allow_different_slices: bool = False,
) -> list[str]:
    """Refuse a job that does not fit what the connected sites say of themselves.

    Args:
        job: from `prepare_job`.
        told: from every connected site.
        without: sites to leave out.
        allow_different_slices: whether sites may cut other planes or use other channels.

    Returns:
        the sites that take part.

    Raises:
        ConfigError: names every problem with its fix; the code of a single one, else
            job-not-runnable.
    """
    connected = [one.site for one in told]
    sites = _taking_part(job.meta, connected, without)
    announced = [one for one in told if one.site in sites]
    problems = [*_by_name(job, connected, without)]
    problems += [problem for _, problem in _announced_problems(job, announced)]
    if not allow_different_slices:
        problems += slicing_problems(announced)
    _refuse(problems)
    return sites


def check_for_canary(
    job: PreparedJob,
    told: Sequence[Announcement],
    without: Sequence[str] = (),
    *,
    allow_different_slices: bool = False,
) -> tuple[list[str], list[tuple[str, ConfigError]]]:
    """As `check_announcements`, but what is wrong at a site is told beside what a canary finds.

    Returns:
        the sites that take part, and site and problem for each thing that their announcements say
        against it ("all sites" for what is wrong between them).

    Raises:
        ConfigError: too few sites, or names that nobody has.
    """
    connected = [one.site for one in told]
    _refuse([*_by_name(job, connected, without)])
    sites = _taking_part(job.meta, connected, without)
    announced = [one for one in told if one.site in sites]
    problems = [*_announced_problems(job, announced)]
    if not allow_different_slices:
        problems += [("all sites", problem) for problem in slicing_problems(announced)]
    return sites, problems


def _by_name(
    job: PreparedJob, connected: Sequence[str], without: Sequence[str]
) -> Iterator[ConfigError]:
    """What names alone tell: some that nobody has, for which FLARE waits in silence; too few."""
    meta = job.meta
    away = _deployed_to(meta) - {EVERYBODY, SERVER} - set(connected) - set(without)
    for name in sorted(away):
        yield ConfigError(
            f"the job's deploy_map names {name}, which is not connected",
            f"connect it, leave it out with --without {name}, or name connected sites in "
            f"meta.json: {_list(connected)}",
            code="unknown-site",
        )
    sites = _taking_part(meta, connected, without)
    for name in sorted(set(meta.get("mandatory_clients") or ()) - set(sites)):
        yield ConfigError(
            f"the job's mandatory_clients names {name}, which "
            f"{'is left out' if name in without else 'does not take part'}",
            f"connect it, or take {name} out of mandatory_clients in meta.json",
            code="mandatory-site-missing",
        )
    of_sites = (
        *(("holdout", name) for name in sorted(job.recipe.holdout)),
        *(("site_learning_rates", name) for name in sorted(job.recipe.sites_with_a_rate)),
    )
    for field, name in of_sites:
        if name in connected or name in without:
            continue
        yield ConfigError(
            f"the recipe's {field} names {name}, which is not connected",
            f"name connected sites: {_list(connected)}",
            code="unknown-site",
        )
    counted = set(sites) - set(job.recipe.holdout) if job.trains else set(sites)
    if len(counted) < job.min_clients:
        yield ConfigError(
            f"the job needs {job.min_clients} {'training ' if job.trains else ''}sites, "
            f"and {len(counted)} can take part",
            f"connect more sites, or allow fewer with --set min_clients={max(1, len(counted))}",
            code="too-few-sites",
        )
    if job.trains and job.recipe.sums_only and len(counted) < LEAST_SITES:
        yield ConfigError(
            f"secure_sum needs {LEAST_SITES} training sites, and {len(counted)} can take part",
            "connect more sites: of two, each would know what the other one sent",
            code="few-for-a-sum",
        )


def _taking_part(
    meta: Mapping[str, Any], connected: Sequence[str], without: Iterable[str]
) -> list[str]:
    """The sites that FLARE would give the job to."""
    named = _deployed_to(meta)
    there = connected if EVERYBODY in named else named.intersection(connected)
    return sorted(set(there).difference(without))


def _announced_problems(
    job: PreparedJob, told: Sequence[Announcement]
) -> Iterator[tuple[str, ConfigError]]:
    """Where what the sites that take part say of themselves does not fit the recipe; by site."""
    for one in told:
        if one.fault == PAUSED:  # the run begins without it, or waits for it
            continue
        leave_out = f"or leave it out with --without {one.site}"
        if not one.ready:
            yield (
                one.site,
                ConfigError(
                    not_ready(one),
                    f"look at its trainer's log and run fedfms check-site at {one.site}, "
                    f"{leave_out}",
                    code="site-not-ready",
                ),
            )
            continue
        for text, fix, code in _misfits(job.recipe, one, job.trains):
            yield one.site, ConfigError(f"{one.site} {text}", f"{fix}, {leave_out}", code=code)


def pausing(told: Sequence[Announcement]) -> list[str]:
    """Sites that pause themselves, a sentence each."""
    return [f"{one.site}: {CODES[PAUSED]}" for one in told if one.fault == PAUSED]


def not_ready(site: Announcement) -> str:
    """That a site is not ready, with the code of its fault and what the code means."""
    what = CODES.get(site.fault or "")
    return f"{site.site} is not ready ({site.fault}){f': {what}' if what else ''}"


def slicing_words(slicing: Slicing | None) -> str:
    """How a site makes pictures, for people."""
    if slicing is None:
        return "not told"
    spacing = spacing_words(slicing.spacing_mm) if slicing.spacing_mm else None
    channels = f"contrasts {' '.join(slicing.contrasts)}" if slicing.contrasts else slicing.channels
    return ", ".join(filter(None, (slicing.plane, channels, slicing.intensity, spacing)))


def slicing_problems(told: Sequence[Announcement]) -> list[ConfigError]:
    """Whether sites would learn from different kinds of pictures: another plane or channels.

    No recipe says these, since a site's files decide what can be had (docs/coordinator.md). A site
    that does not tell them is no problem; see `slicing_warnings`.
    """
    known = [(one.site, one.slicing) for one in told if one.slicing is not None]
    planes = {slicing.plane for _, slicing in known} - {None}  # pictures have none
    if len(planes) < 2 and len({slicing.channels for _, slicing in known}) < 2:
        return []
    groups = grouped((", ".join(filter(None, (s.plane, s.channels))), site) for site, s in known)
    return [
        ConfigError(
            f"sites make pictures in different ways: {groups}",
            "agree on plane and channels in every site.yml, leave a site out with --without SITE, "
            "or submit with --allow-different-slices if that is meant",
            code="different-slices",
        )
    ]


def slicing_warnings(told: Sequence[Announcement]) -> list[str]:
    """What else differs between the pictures of sites, or is not known, as sentences."""
    warnings = []
    known = [(one.site, one.slicing) for one in told if one.slicing is not None]
    silent = [one.site for one in told if one.slicing is None and one.ready]
    if silent and len(told) > 1:
        warnings.append(
            f"{_list(silent)} {'does' if len(silent) == 1 else 'do'} not tell how pictures are "
            "made there; ask whether plane, channels and intensity are those of the others"
        )
    if len({slicing.intensity for _, slicing in known}) > 1:
        groups = grouped((slicing.intensity, site) for site, slicing in known)
        warnings.append(f"grey levels are made in different ways: {groups}")
    measured = [(site, s.spacing_mm) for site, s in known if s.spacing_mm is not None]
    axes = zip(*(mm for _, mm in measured), strict=True)
    if any(max(axis) > MOST_SPACING * min(axis) for axis in axes):
        groups = grouped((spacing_words(mm), site) for site, mm in measured)
        warnings.append(
            f"voxels differ by more than {MOST_SPACING:g} times (slices × rows × columns): {groups}"
        )
    return warnings


def spacing_words(spacing_mm: Sequence[float]) -> str:
    """A spacing for people, in mm."""
    return " × ".join(f"{mm:g}" for mm in spacing_mm) + " mm"


def grouped(pairs: Iterable[tuple[str, str]]) -> str:
    """`a at site-1 and site-3; b at site-2`, of (what, site)."""
    sites: dict[str, list[str]] = {}
    for what, site in pairs:
        sites.setdefault(what, []).append(site)
    return "; ".join(f"{what} at {_list(names)}" for what, names in sites.items())


def _refuse(problems: Sequence[ConfigError]) -> None:
    """Raise the one problem, or one error that names all of them, one line each with its fix."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = [f"- {problem.problem}; fix: {problem.fix}" for problem in problems]
    raise ConfigError(
        "\n  ".join([f"{len(problems)} things keep this job from running:", *lines]),
        "put each right as its line says, then submit again",
        code="job-not-runnable",
    )


def _contrasts_misfit(recipe: Recipe, site: Announcement) -> tuple[str, str, str] | None:
    """Where a site's contrasts do not give those of the recipe; None too where it tells none."""
    if site.slicing is None:
        return None
    there = site.slicing.contrasts
    if not recipe.contrasts:
        if not there:
            return None
        return (
            f"has the contrasts {_list(there)}, and the recipe names none",
            "name those that are learnt from with --set contrasts=NAME,NAME; one is enough",
            "unknown-contrast",
        )
    unknown = [name for name in recipe.contrasts if name not in there]
    if not unknown or (site.slicing.fills_contrasts and len(unknown) < len(recipe.contrasts)):
        return None
    return (
        f"does not have {_list(unknown)}; its contrasts are {_list(there) if there else 'unnamed'}",
        "ask the site to name its images under contrasts in site.yml, and what stands for one that "
        "nobody took under missing_contrast",
        "unknown-contrast",
    )


def _misfits(recipe: Recipe, site: Announcement, trains: bool) -> Iterable[tuple[str, str, str]]:
    if site.version != __version__:
        yield (
            f"runs fedfms {site.version}, here is {__version__}",
            "use the same version everywhere",
            "other-version",
        )
    if recipe.method not in site.methods:
        yield (
            f"does not allow {recipe.method}: its policy says {_list(site.methods)}",
            _meant(recipe.method, site.methods)
            + "ask the site to add the method to its policy/privacy.json",
            "method-not-allowed",
        )
    if recipe.rounds > site.max_rounds:
        yield (
            f"allows {site.max_rounds} rounds, the recipe has {recipe.rounds}",
            f"submit with --set rounds={site.max_rounds}",
            "too-many-rounds",
        )
    will_train = trains and site.site not in recipe.holdout
    if will_train and site.require_secure_sum and not recipe.secure_sum:
        yield (
            "trains only where the server sees sums (require_secure_sum)",
            "submit with --set secure_sum=true, or let it score only with --set "
            f"holdout={site.site}",
            "sum-required",
        )
    if will_train:
        yield from _budget_passed(recipe, site)
    if site.bounds is not None:
        for breach in breaches(site.bounds, recipe.at(site.site), trains=will_train):
            yield f"allows {breach.allowed}, and {breach.has}", breach.fix, breach.code
        if will_train and site.few_patients:
            least = site.bounds.min_training_patients
            yield (
                f"has fewer than {least} patients to train on (min_training_patients)",
                f"let it score only with --set holdout={site.site}, ask the site to lower "
                "min_training_patients in its privacy.json",
                "too-few-training-patients",
            )
        if will_train and (few := _few_steps(site, recipe)):
            about = f"about {site.about_slices} training slices: {few.has}"
            yield f"allows {few.allowed}, and has {about}", few.fix, few.code
    known = {*site.classes, *site.not_annotated}
    if unknown := [name for name in recipe.classes if name not in known]:
        yield (
            f"does not know {'class' if len(unknown) == 1 else 'classes'} {_list(unknown)}; "
            f"it has {_list(site.classes)}",
            "ask the site to map the class in site.yml or to list it under not_annotated",
            "unknown-class",
        )
    elif trains and site.site not in recipe.holdout and not set(recipe.classes) & set(site.classes):
        yield (
            f"annotates none of {_list(recipe.classes)}, so that it cannot train",
            f"make it a holdout with --set holdout={site.site}",
            "nothing-annotated",
        )
    if unfit := _contrasts_misfit(recipe, site):
        yield unfit
    overlap = [pair for pair in site.overlapping if set(pair) <= set(recipe.classes)]
    if recipe.exclusive_classes and overlap:
        yield (
            f"maps a label value to {overlap[0][0]} and {overlap[0][1]}, and the job's classes "
            "exclude each other",
            "submit with --set exclusive_classes=false if they may overlap, ask the site to give "
            "each label value one class of the job",
            "classes-share-values",
        )
    if recipe.require_gpu and site.device != "cuda":
        yield (
            "has no GPU, and the job requires one",
            "start its trainer with the GPU overlay, submit without --gpu",
            "no-gpu",
        )


def _budget_passed(recipe: Recipe, site: Announcement) -> Iterable[tuple[str, str, str]]:
    """For each unit whose epsilon the rounds of the recipe would bring past the site's limit."""
    for cost in site.privacy:
        then = after(cost, recipe)
        if then is None or cost.limit is None or then <= cost.limit:
            continue
        whom = "a patient" if cost.unit == "patient" else "the site"
        yield (
            f"allows epsilon {cost.limit:g} for {whom} (delta {cost.delta:g}), and after the "
            f"{recipe.rounds} rounds {epsilon_text(then)}",
            "ask for fewer rounds or more noise, or let it score only with --set "
            f"holdout={site.site}",
            "privacy-budget",
        )


def _few_steps(site: Announcement, recipe: Recipe) -> Breach | None:
    """Too few steps a round, by the most slices that it may mean."""
    if site.bounds is None or not site.about_slices:
        return None
    return too_few_steps(site.bounds, recipe, math.ceil(1.5 * site.about_slices))


def _meant(method: str, allowed: Sequence[str]) -> str:
    """For a name that nothing here has, and that looks like one which the site allows."""
    close = difflib.get_close_matches(method, allowed, n=1)
    if not close or method in installed_methods():
        return ""
    return f"write {close[0]} in recipe.json if that was meant, or "


def _deployed_to(meta: Mapping[str, Any]) -> set[str]:
    """Names in the job's deploy_map, as FLARE reads them."""
    try:
        named = [name for v in meta["deploy_map"].values() for name in participants_of(v)]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(
            "the deploy_map in the job's meta.json cannot be used",
            'write "deploy_map": {"app": ["@ALL"]}',
            code="deploy-map",
        ) from None
    return {EVERYBODY if name.upper() == EVERYBODY else name for name in named}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a job folder.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_json_object(path)
    except Undecodable as error:
        raise ConfigError(error.problem, error.fix) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}", "correct the file") from None


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
