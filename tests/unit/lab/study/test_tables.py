"""The tables again, from the raw rows of scores.csv and rounds.csv, by other means."""

import csv
import dataclasses
import itertools
import json
import statistics

import numpy as np
import pytest
from run_writer import BYTES, CEILING, SITES, StudyFolder, bend
from scipy import stats

from fedfms.errors import FederationError
from fedfms.records.rows import rows_text
from fedfms_lab.study.analysis.build import answer
from fedfms_lab.study.answer import ALL, FAILS_BELOW, read_study
from fedfms_lab.study.numbers import Number, numbers
from fedfms_lab.study.record import Phase, read_runs

SMALL = {"cases": 9, "rounds": 5, "pictures": ()}

COLUMNS = (
    *("table", "method", "regime", "site", "role", "class"),
    *("metric", "statistic", "value", "n", "unit", "runs"),
)


def answer_of(folder):
    return answer(read_study(folder), read_runs(folder))


def raw_rows(folder):
    """Every row of every scores.csv, with what run.json says of the run."""
    found = []
    for run in sorted((folder / "runs").iterdir()):
        key = json.loads((run / "run.json").read_text())["key"]
        with (run / "scores.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                found.append({**row, **key, "name": run.name})
    return found


def number(text):
    return float(text) if text else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return StudyFolder(**SMALL).write(tmp_path_factory.mktemp("study") / "s")


@pytest.fixture(scope="module")
def raw(folder):
    return raw_rows(folder)


@pytest.fixture(scope="module")
def found(folder):
    return answer_of(folder)


def seed_values(raw, method, regime, site, role, metric="dice"):
    """{seed: mean over runs of the mean over the site's cases}, one class only."""
    by_run = {}
    for row in raw:
        if (row["method"], row["regime"], row["site"], row["role"]) == (method, regime, site, role):
            value = number(row[metric])
            if value is not None:
                by_run.setdefault((row["seed"], row["name"]), []).append(value)
    seeds = {}
    for (seed, _), values in by_run.items():
        seeds.setdefault(seed, []).append(np.mean(values))
    return {seed: float(np.mean(values)) for seed, values in sorted(seeds.items())}


WAYS = list(itertools.product(("fedsam", "fedmsa"), ("federated", "central", "local")))


# ---------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("metric", ["dice", "iou", "hd95"])
@pytest.mark.parametrize("role", ["train", "unseen"])
def test_a_sites_score_is_the_mean_over_folds_then_over_seeds(found, raw, role, metric):
    for method, regime in WAYS:
        line = found.line(method, regime, role, metric)
        assert line.unit == ("mm" if metric == "hd95" else "")
        assert list(line.sites) == list(SITES)
        for site, score in line.sites.items():
            values = seed_values(raw, method, regime, site, role, metric)
            assert score.value == pytest.approx(statistics.fmean(values.values()), rel=1e-12)
            assert score.spread == pytest.approx(statistics.stdev(values.values()), rel=1e-9)
            assert score.by_seed == pytest.approx(list(values.values()), rel=1e-12)
            expected = {
                r["name"]
                for r in raw
                if (r["method"], r["regime"], r["site"], r["role"]) == (method, regime, site, role)
            }
            assert set(score.runs) == expected


@pytest.mark.parametrize("role", ["train", "unseen"])
def test_the_mean_counts_each_site_once_and_its_spread_is_over_seeds(found, raw, role):
    for method, regime in WAYS:
        line = found.line(method, regime, role)
        by_seed = [
            np.mean([seed_values(raw, method, regime, s, role)[seed] for s in SITES])
            for seed in (0, 1, 2)
        ]
        assert line.mean.value == pytest.approx(np.mean(by_seed), rel=1e-12)
        assert line.mean.spread == pytest.approx(np.std(by_seed, ddof=1), rel=1e-9)
        lowest = min(line.sites.items(), key=lambda item: item[1].value)
        assert line.worst == lowest[0]


def test_the_worst_hd95_is_the_largest(found):
    line = found.line("fedmsa", "local", "unseen", "hd95")
    assert line.sites[line.worst].value == max(score.value for score in line.sites.values())


def test_training_sites_are_scored_on_validation_cases_and_unseen_sites_on_all(found):
    counted = {(entry.site, entry.role): entry for entry in found.cases}
    study = StudyFolder(**SMALL)
    for site in SITES:
        names = study.case_names(site)
        validation = [(case, patient) for case, patient, split in names if split == "validation"]
        assert counted[site, "train"].cases == len(validation) < len(names)
        assert counted[site, "train"].patients == len({patient for _, patient in validation})
        assert counted[site, "unseen"].cases == len(names) == 9
        assert counted[site, "unseen"].patients == len({patient for _, patient, _ in names})


def test_a_training_case_of_a_training_site_never_counts(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), seeds=(0,))
    before = answer_of(study.write(tmp_path / "before"))
    for key in study.run_keys():
        for row in [r for r in study.scores(key) if r.role == "train"]:
            lured = dataclasses.replace(row, split="train", case="lure", dice=0.0, iou=0.0)
            study.scores(key).append(lured)
    after = answer_of(study.write(tmp_path / "after"))
    assert after.scores == before.scores and after.gaps == before.gaps
    assert after.cases == before.cases and after.local == before.local


def test_the_best_local_model_is_the_one_with_the_highest_dice_at_that_site(found, raw):
    for method in ("fedsam", "fedmsa"):
        line = found.line(method, "local", "unseen", best=True)
        for site in SITES:
            of_models = {}
            for other in SITES:
                rows = [r for r in raw if r["trained_on"] == [other] and r["method"] == method]
                if other != site:
                    values = seed_values(rows, method, "local", site, "unseen")
                    of_models[other] = np.mean(list(values.values()))
            best = max(of_models, key=of_models.get)
            assert line.sites[site].value == pytest.approx(of_models[best], rel=1e-12)
            assert all(f"-local-at-{best}-" in name for name in line.sites[site].runs)


def test_of_two_sites_a_federation_of_one_is_not_taken_for_a_local_model(tmp_path):
    two = ("site-1", "site-4")
    study = StudyFolder(**SMALL, sites=two, holdouts=two, methods=("fedmsa",))
    lines = answer_of(study.write(tmp_path / "s")).scores
    assert {line.regime for line in lines if line.best} == {"local"}


def test_several_classes_have_lines_of_their_own_and_count_alike_in_the_mean(tmp_path):
    classes = ("optic_disc", "optic_cup")
    study = StudyFolder(**SMALL, classes=classes, methods=("fedmsa",))
    for (
        key
    ) in study.run_keys():  # a class that some cases do not have: its mean is over fewer cases
        rows = study.scores(key)
        for place, row in enumerate(rows):
            if row.class_name == "optic_cup" and row.case.endswith(("00", "03")):
                gone = {"dice": None, "iou": None, "hd95": None, "empty": True, "drawn": False}
                rows[place] = dataclasses.replace(row, **gone)
    folder = study.write(tmp_path / "s")
    found, raw = answer_of(folder), raw_rows(folder)
    line = found.line("fedmsa", "federated", "unseen")
    for site in SITES:
        of_class = {}
        for name in classes:
            rows = [row for row in raw if row["class"] == name]
            values = seed_values(rows, "fedmsa", "federated", site, "unseen")
            of_class[name] = statistics.fmean(values.values())
            own = found.line("fedmsa", "federated", "unseen", class_name=name)
            assert own.sites[site].value == pytest.approx(of_class[name], rel=1e-12)
        assert line.sites[site].value == pytest.approx(np.mean(list(of_class.values())), rel=1e-12)
    assert found.line("fedmsa", "federated", "unseen", class_name="optic_cup").mean.value < (
        found.line("fedmsa", "federated", "unseen", class_name="optic_disc").mean.value
    )


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """Site-1 draws the disc alone."""
    study = StudyFolder(
        **SMALL,
        classes=("disc", "cup"),
        methods=("fedmsa",),
        not_annotated={"site-1": ("cup",)},
    )
    return study.write(tmp_path_factory.mktemp("unlike") / "s")


def test_means_are_over_the_classes_that_all_sites_scored(unlike):
    found, raw = answer_of(unlike), raw_rows(unlike)
    assert (found.common, dict(found.not_annotated)) == (("disc",), {"site-1": ("cup",)})
    discs = [row for row in raw if row["class"] == "disc"]
    for role in ("train", "unseen"):
        for regime in ("federated", "central", "local"):
            line = found.line("fedmsa", regime, role)
            expected = {
                site: statistics.fmean(seed_values(discs, "fedmsa", regime, site, role).values())
                for site in SITES
            }
            assert {s: score.value for s, score in line.sites.items()} == pytest.approx(expected)
            assert line.worst == min(expected, key=lambda site: expected[site])
    cells = {(c.trained_at, c.scored_at): c.dice.value for c in found.local}
    at_home = seed_values(discs, "fedmsa", "local", "site-2", "train")
    assert cells["site-2", "site-2"] == pytest.approx(statistics.fmean(at_home.values()))
    federated, central = (
        case_values(discs, "fedmsa", regime, "train") for regime in ("federated", "central")
    )
    differences = {
        case: np.mean([federated[case][run] - central[case][run] for run in federated[case]])
        for case in federated
    }
    gap = next(g for g in found.gaps if (g.against, g.role, g.site) == ("central", "train", ALL))
    assert gap.difference == pytest.approx(statistics.fmean(site_means(differences).values()))


def test_a_model_is_not_scored_on_a_class_that_nobody_taught_it(unlike):
    found, raw = answer_of(unlike), raw_rows(unlike)
    cups = [row for row in raw if row["class"] == "cup" and row["trained_on"] != ["site-1"]]
    line = found.line("fedmsa", "local", "unseen", class_name="cup")
    assert sorted(line.sites) == ["site-2", "site-3", "site-4"]
    for site, score in line.sites.items():
        values = seed_values(cups, "fedmsa", "local", site, "unseen")
        assert score.value == pytest.approx(statistics.fmean(values.values()), rel=1e-12)


def test_the_best_model_of_another_site_is_best_for_the_class_of_the_table(unlike):
    """The model that is best for the disc may be site-1's, which knows no cup."""
    found, raw = answer_of(unlike), raw_rows(unlike)
    line = found.line("fedmsa", "local", "unseen", class_name="cup", best=True)
    assert sorted(line.sites) == ["site-2", "site-3", "site-4"]
    for site, score in line.sites.items():
        by_model = []
        for other in {"site-2", "site-3", "site-4"} - {site}:
            rows = [r for r in raw if r["class"] == "cup" and r["trained_on"] == [other]]
            values = seed_values(rows, "fedmsa", "local", site, "unseen")
            by_model.append(statistics.fmean(values.values()))
        assert score.value == pytest.approx(max(by_model), rel=1e-12)


def test_scores_of_slices_count_each_slice_once(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",))
    folder = study.write(tmp_path / "s")
    for run in (folder / "runs").iterdir():
        with (run / "scores.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for number, row in enumerate(rows):
            row["slices"] = str(1 + number % 5)
        with (run / "scores.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    line = answer_of(folder).line("fedmsa", "federated", "unseen", "dice_slice")
    by_seed = {}
    for row in raw_rows(folder):
        wanted = ("federated", "unseen", "site-2")
        if (row["regime"], row["role"], row["site"]) == wanted:
            by_seed.setdefault(row["seed"], []).append(row)
    expected = [
        np.average(
            [float(row["dice_slice"]) for row in rows], weights=[int(r["slices"]) for r in rows]
        )
        for rows in by_seed.values()
    ]
    assert line.sites["site-2"].value == pytest.approx(np.mean(expected), rel=1e-12)


def test_a_single_class_has_no_line_besides_the_mean(found):
    assert {line.class_name for line in found.scores} == {ALL}


def test_millimetres_and_pixels_are_never_averaged_together(tmp_path):
    study = StudyFolder(**SMALL, units={"site-3": "px", "site-4": "px"}, methods=("fedmsa",))
    found = answer_of(study.write(tmp_path / "s"))
    for role in ("train", "unseen"):
        lines = [
            line
            for line in found.scores
            if (line.metric, line.role, line.regime) == ("hd95", role, "federated")
        ]
        assert {line.unit: list(line.sites) for line in lines} == {
            "mm": ["site-1", "site-2"],
            "px": ["site-3", "site-4"],
        }
        for line in lines:
            values = [score.value for score in line.sites.values()]
            assert line.mean.value == pytest.approx(sum(values) / 2, rel=1e-12)


def test_one_seed_has_no_spread(tmp_path):
    found = answer_of(StudyFolder(**SMALL, seeds=(3,), methods=("fedmsa",)).write(tmp_path / "s"))
    for line in found.scores:
        assert line.mean.spread is None and line.mean.seeds == 1
        assert all(score.spread is None for score in line.sites.values())


def test_a_site_with_empty_cases_only_has_no_score_and_leaves_the_others_alone(tmp_path, found):
    study = StudyFolder(**SMALL, empty_sites=("site-2",))
    empty = answer_of(study.write(tmp_path / "s"))
    line = empty.line("fedmsa", "federated", "unseen")
    assert list(line.sites) == ["site-1", "site-3", "site-4"]
    assert line.sites["site-1"] == found.line("fedmsa", "federated", "unseen").sites["site-1"]
    assert line.mean.value == pytest.approx(np.mean([s.value for s in line.sites.values()]))
    counted = {(entry.site, entry.role): entry for entry in empty.cases}
    assert counted["site-2", "unseen"].without_value == counted["site-2", "unseen"].cases == 9
    assert counted["site-1", "unseen"].without_value == 0
    assert not any(gap.site == "site-2" for gap in empty.gaps)
    assert all(gap.sites == 3 for gap in empty.gaps if gap.site == ALL)
    curves = {(curve.method, curve.regime): curve for curve in empty.curves}
    assert all(len(curves[way].points) == 6 for way in WAYS)  # of the sites that have a score


# ------------------------------------------------------------------------------------------ gaps


def case_values(raw, method, regime, role, keep=lambda row: True):
    """{(site, patient, case): {(holdout, seed, trained on): dice}}, one class only."""
    found = {}
    for row in raw:
        if (row["method"], row["regime"], row["role"]) != (method, regime, role) or not keep(row):
            continue
        if row["dice"]:
            run = (row["holdout"], row["seed"], tuple(row["trained_on"]))
            found.setdefault((row["site"], row["patient"], row["case"]), {})[run] = float(
                row["dice"]
            )
    return found


def against_central(raw, method, role, keep=lambda row: True):
    left = case_values(raw, method, "federated", role, keep)
    right = case_values(raw, method, "central", role, keep)
    differences = {}
    for case in set(left) & set(right):
        both = set(left[case]) & set(right[case])
        if both:
            differences[case] = np.mean([left[case][run] - right[case][run] for run in both])
    return differences


def against_local(raw, method, role, keep=lambda row: True):
    left = case_values(raw, method, "federated", role)
    right = case_values(raw, method, "local", role, keep)
    differences = {}
    for case in set(left) & set(right):
        of_seeds = []
        for seed in (0, 1, 2):
            mine = [value for run, value in left[case].items() if run[1] == seed]
            theirs = [value for run, value in right[case].items() if run[1] == seed]
            if mine and theirs:
                of_seeds.append(np.mean(mine) - np.mean(theirs))
        if of_seeds:
            differences[case] = np.mean(of_seeds)
    return differences


def site_means(differences):
    sites = {}
    for (site, _, _), value in differences.items():
        sites.setdefault(site, []).append(value)
    return {site: float(np.mean(values)) for site, values in sites.items()}


def patient_means(differences):
    patients = {}
    for (site, patient, _), value in differences.items():
        patients.setdefault((site, patient), []).append(value)
    return [float(np.mean(values)) for values in patients.values()]


def the_gap(found, method, against, role, site=ALL):
    (gap,) = [
        gap
        for gap in found.gaps
        if (gap.method, gap.against, gap.role, gap.site) == (method, against, role, site)
    ]
    return gap


def check_gap(found, method, against, role, differences, *, by_site=True):
    gap = the_gap(found, method, against, role)
    sites = site_means(differences)
    assert gap.difference == pytest.approx(np.mean(list(sites.values())), rel=1e-9)
    patients = patient_means(differences)
    assert (gap.cases, gap.patients, gap.sites) == (len(differences), len(patients), len(sites))
    assert (gap.p is None) == (not gap.primary) == (gap.p_holm is None)
    for site, mean in sites.items() if by_site else ():
        single = the_gap(found, method, against, role, site)
        assert single.difference == pytest.approx(mean, rel=1e-9)
        assert single.p is None and single.p_holm is None
    return gap


@pytest.mark.parametrize("role", ["train", "unseen"])
@pytest.mark.parametrize("method", ["fedsam", "fedmsa"])
def test_federated_against_centralized_is_paired_by_case_fold_and_seed(found, raw, method, role):
    gap = check_gap(found, method, "central", role, against_central(raw, method, role))
    assert gap.interval.low < gap.difference < gap.interval.high
    assert gap.seeds == 3


@pytest.mark.parametrize("method", ["fedsam", "fedmsa"])
def test_federated_against_local_at_the_own_site_and_at_the_others(found, raw, method):
    for role in ("train", "unseen"):
        gap = check_gap(found, method, "local", role, against_local(raw, method, role))
        assert gap.primary and gap.p <= gap.p_holm <= 1
    best = {}
    for site in SITES:
        values = {}
        for other in SITES:
            rows = [r for r in raw if r["trained_on"] == [other] and r["site"] == site]
            seeds = seed_values(rows, method, "local", site, "unseen")
            if seeds:
                values[other] = statistics.fmean(seeds.values())
        best[site] = max(values, key=values.get)
    chosen = against_local(
        raw, method, "unseen", lambda row: row["trained_on"] == [best[row["site"]]]
    )
    check_gap(found, method, "local-best", "unseen", chosen)


def test_methods_against_each_other(found, raw):
    left = case_values(raw, "fedmsa", "federated", "unseen")
    right = case_values(raw, "fedsam", "federated", "unseen")
    differences = {
        case: np.mean([left[case][run] - right[case][run] for run in left[case]]) for case in left
    }
    check_gap(found, "fedmsa", "method", "unseen", differences)


def test_the_interval_is_of_patients_within_sites_and_of_seeds(found, raw):
    """Both standard errors by resampling; how they become an interval: test_statistics.py."""
    by_seed = [
        against_central(raw, "fedmsa", "unseen", lambda row, seed=seed: row["seed"] == seed)
        for seed in (0, 1, 2)
    ]
    of_seeds = [np.mean(list(site_means(one).values())) for one in by_seed]
    sites = {}
    for case in by_seed[0]:
        value = np.mean([one[case] for one in by_seed])
        sites.setdefault(case[0], {}).setdefault(case[1], []).append(value)
    generator = np.random.default_rng(99)
    means = []
    for _ in range(4000):
        of_sites = []
        for patients in sites.values():
            names = list(patients)
            drawn = [patients[names[i]] for i in generator.integers(0, len(names), len(names))]
            of_sites.append(np.mean(np.concatenate(drawn)))
        means.append(np.mean(of_sites))
    n = min(len(patients) for patients in sites.values())
    t_seeds = stats.t.ppf(0.975, 2) * np.std(of_seeds, ddof=1) / np.sqrt(3)
    # resampling is too narrow by sqrt((n - 1) / n); 24 patients in all but their 4 means
    t_patients = stats.t.ppf(0.975, 4 * (n - 1)) * np.std(means) * np.sqrt(n / (n - 1))
    gap = the_gap(found, "fedmsa", "central", "unseen")
    half = (gap.interval.high - gap.interval.low) / 2
    assert gap.difference == pytest.approx(np.mean(of_seeds))
    assert half == pytest.approx(np.hypot(t_seeds, t_patients), rel=0.04)


def test_one_question_is_tested_for_each_method_and_role(found):
    overall = [gap for gap in found.gaps if gap.site == ALL]
    assert len(overall) == 2 * 5 + 2  # two methods; then method against method
    tested = [gap for gap in overall if gap.p is not None]
    assert {(gap.method, gap.role, gap.against) for gap in tested} == {
        (method, role, "local") for method in ("fedsam", "fedmsa") for role in ("train", "unseen")
    }
    smallest = min(tested, key=lambda gap: gap.p)
    assert smallest.p_holm == pytest.approx(min(1, 4 * smallest.p), rel=1e-9)


@pytest.mark.parametrize(
    ("regimes", "asked"),
    [
        (("federated", "local", "ensemble", "central"), {"train": "local", "unseen": "ensemble"}),
        (
            ("federated", "central", "central-matched"),
            dict.fromkeys(("train", "unseen"), "central-matched"),
        ),
        (("federated", "central", "zero-shot"), dict.fromkeys(("train", "unseen"), "central")),
        (("federated", "zero-shot", "scratch"), {}),
    ],
)
def test_what_is_tested_is_against_what_sites_have_without_federating(tmp_path, regimes, asked):
    study = StudyFolder(**SMALL, methods=("fedmsa",), regimes=regimes, holdouts=SITES[:2])
    found = answer_of(study.write(tmp_path / "s"))
    assert {gap.role: gap.against for gap in found.gaps if gap.p is not None} == asked
    assert {gap.against for gap in found.gaps} >= {*regimes} - {"federated"}


def test_two_seeds_are_listed_and_give_no_p_and_one_no_interval(tmp_path):
    for seeds in ((0, 1), (0,)):
        study = StudyFolder(**SMALL, methods=("fedmsa",), seeds=seeds)
        found = answer_of(study.write(tmp_path / f"{len(seeds)}"))
        assert all(gap.p is None and gap.p_holm is None for gap in found.gaps)
        overall = [gap.interval for gap in found.gaps if gap.site == ALL]
        assert all((interval is None) == (len(seeds) == 1) for interval in overall)
        line = found.line("fedmsa", "federated", "train")
        assert line.mean.spread is None and len(line.mean.by_seed) == len(seeds)


def test_what_is_found_where_nothing_is_drawn_is_a_false_alarm_and_no_dice(tmp_path, found):
    study = StudyFolder(**SMALL, methods=("fedmsa",))
    healthy = {"site-1-case-00", "site-1-case-03"}
    for key in study.run_keys():
        rows = study.scores(key)
        for place, row in enumerate(rows):
            if row.case in healthy:
                alarm = key.regime == "federated" and row.case.endswith("00")
                values = {"dice": 0.0, "iou": 0.0, "hd95": 9.0} if alarm else {}
                gone = {"dice": None, "iou": None, "hd95": None, "drawn": False, "empty": not alarm}
                rows[place] = dataclasses.replace(row, **{**gone, **values})
    folder = study.write(tmp_path / "s")
    with_healthy, raw = answer_of(folder), raw_rows(folder)
    shares = {
        (alarms.regime, alarms.role): (alarms.site, alarms.cases, alarms.share.value)
        for alarms in with_healthy.false_alarms
    }
    assert shares["federated", "unseen"] == ("site-1", 2, 0.5)
    assert shares["local", "unseen"] == ("site-1", 2, 0.0)
    assert found.false_alarms == ()
    others = [row for row in raw if row["case"] not in healthy]
    expected = seed_values(others, "fedmsa", "federated", "site-1", "unseen")
    score = with_healthy.line("fedmsa", "federated", "unseen").sites["site-1"]
    assert score.value == pytest.approx(statistics.fmean(expected.values()))
    assert not any(row.table == "false alarms" for row in numbers(found))


def test_a_network_that_was_never_trained_is_scored_at_every_site_in_both_roles(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), regimes=("federated", "zero-shot"))
    folder = study.write(tmp_path / "s")
    found, raw = answer_of(folder), raw_rows(folder)
    own = [row for row in raw if row["regime"] == "zero-shot"]
    validation = [row for row in own if row["split"] == "validation"]
    for role, rows in (("unseen", own), ("train", validation)):
        line = found.line("fedmsa", "zero-shot", role)
        for site, score in line.sites.items():
            values = seed_values(rows, "fedmsa", "zero-shot", site, "unseen")
            assert score.value == pytest.approx(statistics.fmean(values.values()), rel=1e-12)
    assert the_gap(found, "fedmsa", "zero-shot", "train").seeds == 3
    assert not any(curve.regime == "zero-shot" for curve in found.curves)


def test_a_strategy_is_compared_with_the_plain_average_of_its_fold(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), strategies=("prox",))
    folder = study.write(tmp_path / "s")
    found, raw = answer_of(folder), raw_rows(folder)
    assert found.study.regimes == ("federated", "federated prox", "central", "local")
    prox = [row for row in raw if row["strategy"] == "prox"]
    plain = [row for row in raw if row["strategy"] == ""]
    left = case_values(prox, "fedmsa", "federated", "unseen")
    right = case_values(plain, "fedmsa", "federated", "unseen")
    differences = {
        case: np.mean([left[case][run] - right[case][run] for run in left[case]]) for case in left
    }
    gap = check_gap(found, "fedmsa", "strategy", "unseen", differences)
    assert gap.strategy == "prox" and gap.p is None
    values = seed_values(plain, "fedmsa", "federated", "site-2", "unseen")
    mixed_up = found.line("fedmsa", "federated", "unseen").sites["site-2"].value
    assert mixed_up == pytest.approx(statistics.fmean(values.values()), rel=1e-12)


def test_each_way_takes_the_rate_that_is_best_at_its_training_sites(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), seeds=(0,), holdouts=SITES[:2])
    study.rates = (0.001, 0.003)
    for key in study.try_keys():
        # at the sites that train the smaller one is better, at the unseen site the larger
        for place, row in enumerate(study.scores(key)):
            dice = 0.9 if (row.role == "train") == (key.rate == 0.001) else 0.5
            study.scores(key)[place] = dataclasses.replace(row, dice=dice)
    found = answer_of(study.write(tmp_path / "s"))
    assert len(found.choices) == 2 + 2 + 4  # federated, central: two folds each; four sites alone
    for choice in found.choices:
        assert choice.dice == {0.001: pytest.approx(0.9), 0.003: pytest.approx(0.5)}
        assert choice.rate == 0.001
    assert found.strangers == () and found.missing == ()
    without = StudyFolder(**SMALL, methods=("fedmsa",), seeds=(0,), holdouts=SITES[:2])
    assert found.scores == answer_of(without.write(tmp_path / "t")).scores


def test_only_cases_that_both_scored_count(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), regimes=("federated", "central"))
    for key in study.run_keys():
        if key.regime == "central":
            rows = study.scores(key)
            rows[:] = [row for row in rows if row.case != "site-1-case-03"]
        for row in study.scores(key):  # what only one of them scored would move the mean much
            if row.case == "site-1-case-03":
                place = study.scores(key).index(row)
                study.scores(key)[place] = dataclasses.replace(row, dice=0.0)
    folder = study.write(tmp_path / "s")
    found, raw = answer_of(folder), raw_rows(folder)
    gap = check_gap(found, "fedmsa", "central", "unseen", against_central(raw, "fedmsa", "unseen"))
    assert gap.cases == 4 * 9 - 1
    assert abs(gap.difference) < 0.05


def test_missing_runs_are_left_out_on_both_sides(tmp_path):
    """Central without the fold of site-2 in seed 1: federated there is not compared either."""

    def unfinished(key):
        return key.regime == "central" and key.holdout == "site-2" and key.seed == 1

    study = StudyFolder(**SMALL, methods=("fedmsa",), unfinished=unfinished)
    folder = study.write(tmp_path / "s")
    found, raw = answer_of(folder), raw_rows(folder)
    assert found.missing == ("fedmsa-central-without-site-2-seed-1",)
    for role in ("train", "unseen"):
        # at unseen sites seed 1 has not all of them, and does not count; at training sites it has
        whole = (0, 1, 2) if role == "train" else (0, 2)
        expected = [
            against_central(raw, "fedmsa", role, lambda row, seed=seed: row["seed"] == seed)
            for seed in whole
        ]
        mean = {case: np.mean([one[case] for one in expected]) for case in expected[0]}
        gap = check_gap(found, "fedmsa", "central", role, mean, by_site=role == "train")
        assert gap.seeds == len(whole)
        assert "fedmsa-federated-without-site-2-seed-1" not in gap.runs
        assert "fedmsa-federated-without-site-2-seed-0" in gap.runs
    line = found.line("fedmsa", "central", "unseen")
    assert line.sites["site-2"].seeds == 2 and line.sites["site-2"].spread is None
    assert line.mean.seeds == 2 and line.mean.spread is None  # two seeds have all sites
    assert line.mean.value == pytest.approx(np.mean([s.value for s in line.sites.values()]))


def test_one_method_is_compared_with_no_other(tmp_path):
    found = answer_of(StudyFolder(**SMALL, methods=("fedmsa",)).write(tmp_path / "s"))
    assert {gap.method for gap in found.gaps} == {"fedmsa"}
    assert not any(gap.against == "method" for gap in found.gaps) and found.savings == ()
    assert len([gap for gap in found.gaps if gap.site == ALL]) == 5


def test_a_site_with_one_patient_has_a_difference_without_interval(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), regimes=("federated", "central"))
    for key in study.run_keys():
        rows = study.scores(key)
        rows[:] = [r for r in rows if r.site != "site-3" or r.patient == "site-3-patient-00"]
    found = answer_of(study.write(tmp_path / "s"))
    gap = the_gap(found, "fedmsa", "central", "unseen", "site-3")
    assert gap.patients == 1 and gap.interval is None
    assert the_gap(found, "fedmsa", "central", "unseen").interval is None
    assert the_gap(found, "fedmsa", "central", "unseen", "site-1").interval is not None
    assert the_gap(found, "fedmsa", "central", "unseen", "site-1").patients == 7
    few = the_gap(found, "fedmsa", "central", "train", "site-1")
    assert few.patients < 5 and few.interval is None


# ----------------------------------------------------------------------------------------- local


def test_the_local_matrix_and_how_far_each_model_is_behind(found, raw):
    assert len(found.local) == 2 * 4 * 4
    for cell in found.local:
        role = "train" if cell.trained_at == cell.scored_at else "unseen"
        own = [r for r in raw if r["trained_on"] == [cell.trained_at]]
        values = seed_values(own, cell.method, "local", cell.scored_at, role)
        assert cell.dice.value == pytest.approx(statistics.fmean(values.values()), rel=1e-12)
        differences = against_local(
            [row for row in raw if row["site"] == cell.scored_at],
            cell.method,
            role,
            lambda row, at=cell.trained_at: row["trained_on"] == [at],
        )
        assert cell.behind_role == role
        assert cell.behind == pytest.approx(np.mean(list(differences.values())), rel=1e-9)
        assert cell.behind_cases == len(differences)
        away = cell.trained_at != cell.scored_at
        assert cell.fails == (away and np.mean(list(differences.values())) > FAILS_BELOW)
    fails = {(c.trained_at, c.scored_at) for c in found.local if c.fails}
    assert ("site-1", "site-4") in fails and ("site-3", "site-4") not in fails


def test_without_a_fold_local_models_are_compared_where_the_site_trained(tmp_path):
    study = StudyFolder(**SMALL, holdouts=(None,), methods=("fedmsa",))
    found = answer_of(study.write(tmp_path / "s"))
    validation = sum(split == "validation" for _, _, split in study.case_names("site-1"))
    assert all(cell.behind_role == "train" for cell in found.local)
    assert all(cell.behind_cases == validation for cell in found.local)
    assert found.line("fedmsa", "federated", "unseen") is None
    assert not any(gap.role == "unseen" for gap in found.gaps)


# ------------------------------------------------------------------------------ learning and cost


def raw_rounds(folder, name):
    with (folder / "runs" / name / "rounds.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def raw_curve(folder, raw, name):
    """[(round, Dice, bytes before)] of a run, the final model last."""
    rows = raw_rounds(folder, name)
    points, moved = [], 0
    for at in range(5):
        here = [row for row in rows if int(row["round"]) == at]
        dice = [float(row["dice"]) for row in here if row["role"] == "train"]
        points.append((at, np.mean(dice), moved))
        moved += sum(int(row["bytes_down"]) + int(row["bytes_up"]) for row in here)
    sites = {}
    for row in raw:
        if row["name"] == name and row["role"] == "train":
            sites.setdefault(row["site"], []).append(float(row["dice"]))
    final = np.mean([np.mean(values) for values in sites.values()])
    return [*points, (5, final, moved)]


def runs_of(raw, method, regime):
    return sorted({r["name"] for r in raw if (r["method"], r["regime"]) == (method, regime)})


def test_curves_are_means_over_folds_and_seeds_with_their_range(found, folder, raw):
    for method, regime in WAYS:
        (curve,) = [c for c in found.curves if (c.method, c.regime) == (method, regime)]
        runs = [raw_curve(folder, raw, name) for name in runs_of(raw, method, regime)]
        if regime == "local":  # the four models of a seed stand beside one model of all sites
            names = runs_of(raw, method, regime)
            groups = [
                [curve for curve, name in zip(runs, names, strict=True) if name.endswith(seed)]
                for seed in ("seed-0", "seed-1", "seed-2")
            ]
            runs = [np.mean(group, axis=0) for group in groups]
        assert [point.round for point in curve.points] == list(range(6))
        for at, point in enumerate(curve.points):
            dice = [run[at][1] for run in runs]
            assert point.dice.mean == pytest.approx(np.mean(dice), rel=1e-9)
            assert point.dice.low == pytest.approx(min(dice), rel=1e-9)
            assert point.dice.high == pytest.approx(max(dice), rel=1e-9)
            if regime == "federated":
                assert point.bytes_moved == pytest.approx(np.mean([run[at][2] for run in runs]))
            else:
                assert point.bytes_moved is None


def test_a_round_that_a_training_site_missed_gives_no_point(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), regimes=("federated",), seeds=(0,))
    whole = study.round_rows

    def with_a_miss(key):
        return [
            dataclasses.replace(row, accepted=False, dice=None)
            if row.round == 2 and row.site == "site-1" and key.holdout == "site-4"
            else row
            for row in whole(key)
        ]

    study.round_rows = with_a_miss
    folder = study.write(tmp_path / "s")
    (curve,) = answer_of(folder).curves
    assert [point.dice.n for point in curve.points] == [4, 4, 3, 4, 4, 4]


def test_bytes_and_rounds_until_the_dice_that_central_training_reached(found, folder, raw):
    targets = {}
    for site in SITES:
        ends = {
            method: np.mean(
                [
                    raw_curve(folder, raw, name)[-1][1]
                    for name in runs_of(raw, method, "central")
                    if f"-without-{site}-" in name
                ]
            )
            for method in ("fedsam", "fedmsa")
        }
        targets[site] = 0.95 * min(ends.values())
    for moved in found.communication:
        hits = []
        for name in runs_of(raw, moved.method, "federated"):
            site = next(s for s in SITES if f"-without-{s}-" in name)
            curve = raw_curve(folder, raw, name)
            hit = next((point for point in curve if point[1] >= targets[site]), None)
            if hit:
                hits.append((name, hit))
        assert moved.target.mean == pytest.approx(np.mean(list(targets.values())), rel=1e-9)
        assert list(moved.reached) == [name for name, _ in hits] and hits
        assert moved.rounds_to_target.mean == pytest.approx(np.mean([h[0] for _, h in hits]))
        assert moved.bytes_to_target.mean == pytest.approx(np.mean([h[2] for _, h in hits]))
        assert moved.bytes_to_target.high == max(h[2] for _, h in hits)
        assert (moved.down.mean, moved.up.mean) == (BYTES[moved.method],) * 2
        # the unseen site receives the model to score it, and sends nothing
        assert moved.total_down.mean == 5 * 4 * BYTES[moved.method]
        assert moved.total_up.mean == 5 * 3 * BYTES[moved.method]
        assert set(moved.target_runs) <= {
            *runs_of(raw, "fedsam", "central"),
            *runs_of(raw, "fedmsa", "central"),
        }


def test_a_target_that_the_study_names_and_nobody_reaches(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), target_dice=0.99)
    (moved,) = answer_of(study.write(tmp_path / "s")).communication
    assert moved.target.mean == pytest.approx(0.99) and moved.target_runs == ()
    assert moved.reached == () and moved.bytes_to_target is None


def test_without_central_runs_there_is_no_target(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), regimes=("federated", "local"))
    (moved,) = answer_of(study.write(tmp_path / "s")).communication
    assert moved.target is None and moved.rounds_to_target is None


def test_savings_are_shares_of_what_the_larger_method_needs(found):
    by_what = {saving.what: saving for saving in found.savings}
    a_round = by_what["bytes a site and round, both ways"]
    assert (a_round.method, a_round.other) == ("fedmsa", "fedsam")
    assert a_round.share == pytest.approx(1 - BYTES["fedmsa"] / BYTES["fedsam"], rel=1e-12)
    assert by_what["peak memory of train"].share == pytest.approx(1 - 6.4 / 11.8, rel=1e-12)


def test_seconds_and_peak_memory_come_from_the_runs(tmp_path):
    study = StudyFolder(
        **SMALL, methods=("fedmsa",), regimes=("central",), holdouts=("site-1",), seeds=(0, 1)
    )
    folder = study.write(tmp_path / "s")
    for name, seconds, peak in (("seed-0", 100.0, 5_000), ("seed-1", 140.0, 9_000)):
        train = {"train": Phase(seconds=seconds, peak_memory_bytes=peak)}
        bend(
            folder / "runs" / f"fedmsa-central-without-site-1-{name}",
            lambda record, train=train: dataclasses.replace(
                record, phases={**record.phases, **train}, seconds=train["train"].seconds + 7
            ),
        )
    (cost,) = answer_of(folder).training
    assert (cost.seconds["train"].mean, cost.seconds["train"].high) == (120.0, 140.0)
    assert cost.peak_memory_bytes["train"] == 9_000
    assert cost.wall_seconds.mean == 127.0 and "exchange" not in cost.seconds


# ---------------------------------------------------------------------------------- the csv itself


def test_csv_is_tidy_and_every_row_names_its_runs(found, folder):
    rows = list(csv.DictReader(rows_text(Number, numbers(found)).splitlines()))
    assert tuple(rows[0]) == COLUMNS
    keys = [
        tuple(row[name] for name in COLUMNS if name not in ("value", "n", "runs")) for row in rows
    ]
    single = [key for key, row in zip(keys, rows, strict=True) if row["table"] != "runs"]
    assert len(set(single)) == len(single)
    there = {path.name for path in (folder / "runs").iterdir()}
    for row in rows:
        float(row["value"])
        named = set(row["runs"].split(";")) - {""}
        assert named <= there
        assert named or row["statistic"] in ("planned", "count")


def test_csv_holds_scores_with_all_their_digits(found, raw):
    rows = list(csv.DictReader(rows_text(Number, numbers(found)).splitlines()))
    (row,) = [
        row
        for row in rows
        if (row["table"], row["method"], row["regime"], row["site"], row["role"], row["metric"])
        == ("scores", "fedmsa", "federated", "site-2", "unseen", "dice")
        and row["statistic"] == "mean"
    ]
    values = seed_values(raw, "fedmsa", "federated", "site-2", "unseen")
    assert float(row["value"]) == pytest.approx(statistics.fmean(values.values()), rel=1e-14)
    assert row["n"] == "3" and row["runs"].count(";") == 2


# ------------------------------------------------------------------------------------- the study


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(FederationError, match="name the folder of a study") as caught:
        read_study(tmp_path)
    assert caught.value.code == "no-study"
    (tmp_path / "study.json").write_text('{"format": 1, "name": "x"}')
    with pytest.raises(FederationError, match="start the study again"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text('["format"]')
    with pytest.raises(FederationError):
        read_study(tmp_path)


def test_runs_that_are_not_planned_count_nowhere(tmp_path):
    study = StudyFolder(**SMALL, methods=("fedmsa",), seeds=(0,))
    folder = study.write(tmp_path / "s")
    before = answer_of(folder)
    extra = StudyFolder(**SMALL, methods=("fedmsa",), seeds=(5,), regimes=("local",))
    for key in extra.run_keys():
        extra.write_run(folder / "runs" / key.name, key)
    after = answer_of(folder)
    assert after.strangers == tuple(f"fedmsa-local-at-{site}-seed-5" for site in SITES)
    assert after.scores == before.scores and after.runs == before.runs


def test_the_writer_gives_what_the_tests_ask_of_it(found):
    """Federated training comes near its ceiling; else these tests would say little."""
    line = found.line("fedmsa", "federated", "train")
    assert all(abs(line.sites[site].value - CEILING[site]) < 0.06 for site in SITES)
