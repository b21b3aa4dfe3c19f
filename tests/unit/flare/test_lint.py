from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from fedfms import __version__
from fedfms.contracts.announcement import Announcement, NoisedSums, PrivacySpent, Slicing
from fedfms.contracts.policy import Bounds
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ConfigError, FederationError
from fedfms.exchange.account import Noised, epsilon
from fedfms.flare.lint import PreparedJob, check_announcements, pausing, slicing_warnings
from fedfms.flare.session import (
    Admin,
    Coordinator,
    deploy,
    prepare_job,
)

SAGITTAL = Slicing("sagittal", "neighbours", "percentile:0.5:99.5", (1.0, 1.0, 1.0))
AXIAL = dataclasses.replace(SAGITTAL, plane="axial", channels="gray")
PICTURES = Slicing(None, "gray", "range:0:255")

JOBS = Path(__file__).resolve().parents[3] / "jobs"


def site(name: str, **changes: object) -> Announcement:
    """A site that fits every job on lesions."""
    fits = Announcement(
        site=name,
        version=__version__,
        classes=("lesion",),
        methods=("fedsam", "fedmsa"),
        max_rounds=100,
        device="cpu",
    )
    return dataclasses.replace(fits, **changes)  # type: ignore[arg-type]


THREE = [site("site-1"), site("site-2"), site("site-3")]


@pytest.fixture
def prepare(tmp_path: Path):
    def one(*overrides: str, **meta: object) -> PreparedJob:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))  # of this one
        folder.mkdir()
        job = prepare_job(JOBS / "fedmsa", folder / "job", overrides)
        path = job.folder / "meta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **meta}))
        return job

    return one


def refusal(job: PreparedJob, told: list[Announcement], *without: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        check_announcements(job, told, without)
    return error.value


def test_a_job_that_fits_goes_to_every_connected_site(prepare) -> None:
    assert check_announcements(prepare("holdout=site-3"), THREE) == ["site-1", "site-2", "site-3"]


@pytest.mark.parametrize(
    ("changes", "code", "problem", "fix"),
    [
        (
            {"fault": "no-trainer"},
            "site-not-ready",
            "site-2 is not ready (no-trainer)",
            "--without site-2",
        ),
        (
            {"fault": "strange-code"},
            "site-not-ready",
            "(strange-code)",
            "fedfms check-site at site-2",
        ),
        (
            {"version": "0.0.9"},
            "other-version",
            f"site-2 runs fedfms 0.0.9, here is {__version__}",
            "same version",
        ),
        (
            {"methods": ("fedsam",)},
            "method-not-allowed",
            "site-2 does not allow fedmsa",
            "privacy.json",
        ),
        (
            {"max_rounds": 5},
            "too-many-rounds",
            "site-2 allows 5 rounds, the recipe has 6",
            "--set rounds=5",
        ),
        (
            {"classes": ("disc",)},
            "unknown-class",
            "site-2 does not know class lesion; it has disc",
            "not_annotated",
        ),
        (
            {"classes": ("disc",), "not_annotated": ("lesion",)},
            "nothing-annotated",
            "site-2 annotates none of lesion",
            "--set holdout=site-2",
        ),
    ],
)
def test_a_site_that_does_not_fit_is_named_with_the_fix(
    prepare, changes: dict[str, object], code: str, problem: str, fix: str
) -> None:
    error = refusal(prepare(), [THREE[0], site("site-2", **changes), THREE[2]])
    assert error.code == code
    assert problem in error.problem
    assert fix in error.fix


def test_a_recipe_out_of_a_sites_bounds_is_said_before_it_is_submitted(prepare) -> None:
    told = [THREE[0], site("site-2", bounds=Bounds(), about_slices=10), THREE[2]]
    job = prepare()

    def by(**values: object) -> PreparedJob:
        return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, **values))

    error = refusal(by(batch_size=2, clip_grad_norm=1e-12, local_epochs=1), told)
    assert error.code == "job-not-runnable"
    for part in (
        "site-2 allows batch_size of at least 4 slices (min_batch_size), and batch_size is 2",
        "site-2 allows clip_grad_norm of at least 0.1 (min_clip_grad_norm), and clip_grad_norm is "
        "1e-12",
    ):
        assert part in error.problem
    error = refusal(by(local_epochs=1, batch_size=8), told)
    assert error.code == "too-few-steps"  # also with the most that about 10 slices may be
    assert "at least 4 steps (min_steps), and has about 10 training slices" in error.problem
    everybody = ["site-1", "site-2", "site-3"]
    assert check_announcements(by(local_epochs=1, batch_size=4), told) == everybody
    assert check_announcements(by(batch_size=2, holdout=("site-2",)), told) == everybody


def test_a_site_with_too_few_patients_is_said_before_it_refuses_a_round(prepare) -> None:
    told = [THREE[0], site("site-2", bounds=Bounds(), few_patients=True), THREE[2]]
    job = prepare()
    error = refusal(job, told)
    assert error.code == "too-few-training-patients"
    assert "site-2 has fewer than 10 patients to train on (min_training_patients)" in error.problem
    assert "--set holdout=site-2" in error.fix and "privacy.json" in error.fix
    scores = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, holdout=("site-2",)))
    assert check_announcements(scores, told)


def test_a_site_that_pauses_takes_part_later_and_who_submits_reads_so(prepare) -> None:
    told = [site("site-1"), Announcement("site-2", fault="paused"), site("site-3")]
    assert check_announcements(prepare(), told) == ["site-1", "site-2", "site-3"]
    assert pausing(told) == [
        "site-2: it paused itself, and takes part again when the pause is over"
    ]


def test_a_method_that_nobody_has_is_told_with_the_one_that_was_meant(prepare) -> None:
    job = prepare()
    for method, fix in (
        ("fedmas", "write fedmsa in recipe.json if that was meant, or ask the site to add"),
        ("decoder", "ask the site to add the method to its policy/privacy.json"),
    ):
        recipe = dataclasses.replace(job.recipe, method=method)
        error = refusal(dataclasses.replace(job, recipe=recipe), [site("site-1"), site("site-2")])
        assert error.code == "job-not-runnable"
        assert f"site-1 does not allow {method}: its policy says fedsam, fedmsa" in error.problem
        assert f"fix: {fix}" in error.problem


def test_a_class_that_a_site_knows_and_never_drew_is_fine_beside_one_that_it_drew(prepare) -> None:
    two = site("site-2", classes=("disc",), not_annotated=("lesion",))
    one = site("site-1", classes=("lesion", "disc"))
    assert check_announcements(prepare("classes=lesion,disc"), [one, two]) == ["site-1", "site-2"]


def test_a_holdout_needs_no_class_of_its_own_annotated(prepare) -> None:
    told = [*THREE[:2], site("site-3", classes=("disc",), not_annotated=("lesion",))]
    assert len(check_announcements(prepare("holdout=site-3"), told)) == 3


def test_a_gpu_that_is_required_must_be_at_every_site(prepare) -> None:
    told = [site("site-1", device="cuda"), site("site-2")]
    error = refusal(prepare("require_gpu=true"), told)
    assert (error.code, error.problem) == (
        "no-gpu",
        "site-2 has no GPU, and the job requires one",
    )


def test_a_site_left_out_need_not_fit_and_does_not_count(prepare) -> None:
    told = [*THREE[:2], site("site-3", fault="no-trainer")]
    job = prepare()
    assert check_announcements(job, told, ["site-3"]) == ["site-1", "site-2"]
    error = refusal(job, told, "site-3", "site-2")
    assert "needs 2 training sites, and 1 can take part" in error.problem


@pytest.mark.parametrize("named", [["server", "site-1", "site-7"], {"sites": ["site-1", "site-7"]}])
def test_a_name_in_the_deploy_map_that_nobody_has_is_refused(prepare, named: object) -> None:
    error = refusal(prepare("min_clients=1", deploy_map={"app": named}), THREE)
    assert error.code == "unknown-site"
    assert "deploy_map names site-7" in error.problem


@pytest.mark.parametrize("deploy_map", [None, {}, {"app": {"there": []}}, {"app": 3}, "@ALL"])
def test_a_deploy_map_that_reaches_nobody_is_refused(prepare, deploy_map: object) -> None:
    refusal(prepare(deploy_map=deploy_map), THREE)


def test_a_mandatory_site_must_take_part(prepare) -> None:
    job = prepare(mandatory_clients=["site-1", "site-8"])
    error = refusal(job, THREE)
    assert error.code == "mandatory-site-missing"
    assert "site-8" in error.problem
    error = refusal(job, THREE, "site-1")
    assert "mandatory_clients names site-1, which is left out" in error.problem


def test_a_rate_of_a_site_is_of_one_that_is_there_and_is_held_against_its_own_policy(
    prepare,
) -> None:
    error = refusal(prepare("site_learning_rates=site-9:1e-3"), THREE)
    assert "site_learning_rates names site-9, which is not connected" in error.problem
    told = [dataclasses.replace(one, bounds=Bounds(max_learning_rate=0.01)) for one in THREE]
    job = prepare("site_learning_rates=site-2:0.05")
    error = refusal(job, told)
    assert "site-2" in error.problem and "learning_rate is 0.05" in error.problem
    assert "site-1" not in error.problem and "site-3" not in error.problem


def test_several_problems_come_in_one_error_a_line_each(prepare) -> None:
    error = refusal(
        prepare("holdout=site-9", "min_clients=4"), [THREE[0], site("site-2", max_rounds=1)]
    )
    assert error.code == "job-not-runnable"
    lines = error.problem.splitlines()
    assert lines[0] == "3 things keep this job from running:"
    assert len(lines) == 4
    assert all("; fix: " in line for line in lines[1:])


def test_leaving_a_site_out_holds_even_if_more_sites_connect(prepare) -> None:
    job = prepare()
    deploy(job, ["site-1", "site-2"], leaves_out=True)
    assert job.meta["deploy_map"] == {"app": ["server", "site-1", "site-2"]}
    (job.folder / "app/config/model.safetensors").write_bytes(b"model")
    deploy(job, ["site-1", "site-2"], leaves_out=True)
    assert job.meta["deploy_map"] == {"app": ["server"], "app_site": ["site-1", "site-2"]}


class Submitted:
    """A session that keeps what a job was submitted with."""

    def submit_job(self, folder: str) -> str:
        self.deploy_map = json.loads((Path(folder) / "meta.json").read_text())["deploy_map"]
        return "0123"


@pytest.mark.parametrize("leaves_out", [False, True])
def test_a_model_to_start_from_is_submitted_for_the_server_alone(prepare, leaves_out) -> None:
    job, session = prepare(), Submitted()
    (job.folder / "app/config/model.safetensors").write_bytes(b"model")
    coordinator = Coordinator(session, Admin("ann@a.org", "a", "lead"))
    deploy(job, ["site-1", "site-2"], leaves_out=leaves_out)
    assert coordinator.submit_prepared(job.folder) == "0123"
    assert session.deploy_map == {"app": ["server"], "app_site": ["site-1", "site-2"]}
    assert not (job.folder / "app_site/config/model.safetensors").exists()
    assert (job.folder / "app_site/config/recipe.json").is_file()


def test_signatures_of_an_earlier_submission_are_not_copied(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(JOBS / "fedmsa", tmp_path / "signed")
    (tmp_path / "signed" / "app" / ".__nvfl_sig.json").write_text("{}")
    job = prepare_job(tmp_path / "signed", tmp_path / "copy")
    assert not list(job.folder.rglob(".__nvfl*"))


def test_requiring_a_gpu_makes_another_recipe() -> None:
    recipe = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")
    assert recipe.require_gpu is False
    assert recipe.with_overrides(["require_gpu=true"]).sha256 != recipe.sha256


# -------------------------------------------------------------------------- how pictures are made


def with_slices(*slicing: Slicing | None) -> list[Announcement]:
    return [site(f"site-{i}", slicing=one) for i, one in enumerate(slicing, 1)]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (AXIAL, "sagittal, neighbours at site-1, site-2; axial, gray at site-3"),
        (dataclasses.replace(SAGITTAL, plane="axial"), "axial, neighbours at site-3"),
        (dataclasses.replace(SAGITTAL, channels="gray"), "sagittal, gray at site-3"),
        (PICTURES, "gray at site-3"),
    ],
)
def test_another_plane_or_other_channels_keep_a_job_from_running(prepare, other, words) -> None:
    told = with_slices(SAGITTAL, SAGITTAL, other)
    job = prepare("holdout=site-3")  # a holdout that sees other pictures scores wrongly
    error = refusal(job, told)
    assert error.code == "different-slices"
    assert words in error.problem
    assert "--allow-different-slices" in error.fix
    assert len(check_announcements(job, told, allow_different_slices=True)) == 3
    two = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, holdout=()))
    assert check_announcements(two, told, ["site-3"]) == ["site-1", "site-2"]


def test_pictures_go_with_volumes_of_any_plane(prepare) -> None:
    told = with_slices(AXIAL, PICTURES)
    assert check_announcements(prepare(), told) == ["site-1", "site-2"]


def test_a_site_that_does_not_tell_is_unknown_and_no_error(prepare) -> None:
    told = with_slices(SAGITTAL, SAGITTAL, None)
    assert len(check_announcements(prepare("holdout="), told)) == 3
    (warning,) = slicing_warnings(told)
    assert warning.startswith("site-3 does not tell how pictures are made")
    assert slicing_warnings(with_slices(SAGITTAL, AXIAL)) == []  # an error of its own


@pytest.mark.parametrize(
    ("spacing", "warns"),
    [((1.0, 1.0, 2.0), False), ((0.4, 1.0, 1.0), True), ((1.0, 1.0, 2.1), True), (None, False)],
)
def test_voxels_more_than_twice_as_far_apart_are_a_warning(spacing, warns) -> None:
    told = with_slices(SAGITTAL, dataclasses.replace(SAGITTAL, spacing_mm=spacing))
    warnings = slicing_warnings(told)
    assert len(warnings) == warns
    if warns:
        assert "1 × 1 × 1 mm at site-1" in warnings[0]


def test_other_grey_levels_are_a_warning() -> None:
    window = dataclasses.replace(AXIAL, intensity="window:40:400")
    (warning,) = slicing_warnings(with_slices(window, window, AXIAL))
    assert "window:40:400 at site-1, site-2; percentile:0.5:99.5 at site-3" in warning


def test_a_site_whose_classes_overlap_does_not_take_part_where_they_exclude_each_other(
    prepare,
) -> None:
    overlap = site("site-2", classes=("disc", "cup", "rim"), overlapping=(("disc", "cup"),))
    told = [site("site-1", classes=("disc", "cup", "rim")), overlap]
    job = prepare("classes=disc,cup", "exclusive_classes=true")
    error = refusal(job, told)
    assert error.code == "classes-share-values"
    assert "site-2 maps a label value to disc and cup" in error.problem
    assert "--set exclusive_classes=false" in error.fix
    for changes in ({"exclusive_classes": False}, {"classes": ("disc", "rim")}):
        fits = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, **changes))
        assert check_announcements(fits, told) == ["site-1", "site-2"]


def test_a_site_that_trains_in_sums_only_says_so_before_the_run(prepare) -> None:
    told = [site("site-1", require_secure_sum=True), *THREE[1:]]
    refused = refusal(prepare(), told)
    assert refused.code == "sum-required"
    assert "site-1 trains only where the server sees sums (require_secure_sum)" in refused.problem
    assert "--set secure_sum=true" in refused.fix
    for allowed in ("secure_sum=true", "holdout=site-1"):
        check_announcements(prepare(allowed), told)


def test_rounds_that_would_pass_a_sites_budget_are_refused_with_the_figure(prepare) -> None:
    """Ten rounds at noise 4 left: epsilon 3.35 at delta 1e-5, 4.99 after ten more."""
    from fedfms.cli.jobs import _privacy_lines

    spent = PrivacySpent("site", 3.35, 7.0, 1e-5, (NoisedSums(4.0, 1.0, 10),), 4.0)
    told = [site("site-1", privacy=(spent,)), *THREE[1:]]
    refused = refusal(prepare("rounds=30"), told)
    assert refused.code == "privacy-budget"
    assert "site-1 allows epsilon 7 for the site (delta 1e-05), and after the 30" in refused.problem
    then = epsilon([Noised(4.0, 1.0, 40)], 1e-5)
    assert f"epsilon {then:.1f}" in refused.problem and then > 7
    assert check_announcements(prepare("rounds=10"), told)
    assert check_announcements(prepare("rounds=30", "holdout=site-1"), told)
    (line,) = _privacy_lines(told, prepare("rounds=10").recipe)
    assert line.startswith("site-1: epsilon 3.35 of 7 so far, epsilon 4.99 ")
    assert "after 10 rounds more for the site" in line
    unlimited = dataclasses.replace(spent, limit=None)
    told = [site("site-1", privacy=(unlimited,)), *THREE[1:]]
    assert check_announcements(prepare("rounds=30"), told)
    assert "3.35 without a limit so far" in _privacy_lines(told)[0]
    of_patients = PrivacySpent("patient", 0.0, 8.0, 1e-5, (), 0.0)
    told = [site("site-1", privacy=(of_patients,)), *THREE[1:]]
    assert "infinite" in refusal(prepare(), told).problem  # the recipe has no noise


# ------------------------------------------------------------------------------- fedfms status


def test_the_status_fits_80_columns_and_explains_its_codes(capsys) -> None:
    from rich.console import Console

    from fedfms.cli.jobs import _about_sites, _sites_table

    told = [
        site("st-mary", slicing=AXIAL, busy=True),
        Announcement("lakeside", fault="site-files-slow", busy=True),
        Announcement("northern", fault="no-trainer"),
    ]
    console = Console(width=80)
    console.print(_sites_table(told))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in ("st-mary", "lakeside", "northern"):
        assert sum(name in line for line in lines) == 1
    assert len([line for line in lines if line.strip()]) == 1 + 2 + 3  # title, head, sites
    assert _about_sites(told) == [
        "lakeside is not ready (site-files-slow): its site.yml or policy cannot be read",
        "northern is not ready (no-trainer): no trainer answers there",
        "slices: axial, gray, percentile:0.5:99.5, 1 × 1 × 1 mm at st-mary",
        "",
    ]


@pytest.mark.parametrize(
    ("role", "may"),
    [("member", False), ("org_admin", False), ("lead", True), ("project_admin", True), ("x", True)],
)
def test_who_may_not_submit_is_told_that_first(role: str, may: bool) -> None:
    coordinator = Coordinator(None, Admin("ann@a.org", "a", role))
    with contextlib.nullcontext() if may else pytest.raises(FederationError) as refused:
        coordinator.require_right("submit_job", "submit the job")
    if not may:
        assert "which does not allow it" in refused.value.problem
        assert "project_admin, lead" in refused.value.fix


# -------------------------------------------------------------------------------------- contrasts


def test_a_recipe_names_contrasts_that_every_site_has_or_fills_in(prepare) -> None:
    four = dataclasses.replace(AXIAL, contrasts=("t1", "t1ce", "t2", "flair"))
    three = dataclasses.replace(four, contrasts=("t1", "t2", "flair"))
    filled = dataclasses.replace(three, fills_contrasts=True)
    asked = prepare("contrasts=t1,t1ce,t2,flair")
    assert len(check_announcements(asked, with_slices(four, filled, four))) == 3
    error = refusal(asked, with_slices(four, three, four))
    assert error.code == "unknown-contrast"
    assert "site-2 does not have t1ce; its contrasts are t1, t2, flair" in error.problem
    error = refusal(asked, with_slices(four, AXIAL, four))
    assert error.problem.endswith("its contrasts are unnamed")
    error = refusal(prepare(), with_slices(four, four, four))
    assert error.code == "job-not-runnable"
    assert "site-1 has the contrasts t1, t1ce, t2, flair, and the recipe names none" in str(error)
    assert len(check_announcements(prepare("contrasts=t1"), with_slices(four, three))) == 2
    assert check_announcements(prepare(), with_slices(AXIAL, AXIAL)) == ["site-1", "site-2"]
