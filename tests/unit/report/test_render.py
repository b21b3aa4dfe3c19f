import base64
import dataclasses
import re
from html.parser import HTMLParser

import pytest
from job_writer import BYTES_DOWN, BYTES_UP, CASES, RECIPE, Job, dice_of

from fedfms.pages.parts import picture_key
from fedfms.report import words
from fedfms.report.collect import collect
from fedfms.report.render import render


class Page(HTMLParser):
    """Tables, text, tags and attributes of a page, as a browser would read them."""

    VOID = ("meta", "img", "br", "link", "path", "use")

    def __init__(self, text):
        super().__init__()
        self.tables, self.words, self.tags, self.attributes = [], [], [], []
        self._cell, self._small, self._skip = None, 0, 0
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""
            self._span = int(dict(attrs).get("colspan", 1))
        elif tag == "small" or (tag, "class", "tag") in self.attributes[-1:]:
            self._small += 1
        elif tag == "style":
            self._skip += 1

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1] += [self._cell.strip()] + [""] * (self._span - 1)
            self._cell = None
        elif tag in ("small", "span") and self._small:
            self._small -= 1
        elif tag == "style":
            self._skip -= 1

    def handle_data(self, data):
        if self._skip:
            return
        self.words.append(data)
        if self._cell is not None and not self._small:
            self._cell += data

    def table(self, *titles):
        return next(t for t in self.tables if t[0][: len(titles)] == list(titles))


def build(tmp_path, job=None, records=None):
    results = tmp_path / "results"
    collect((job or Job()).write(tmp_path / "job", records), results)
    render(results)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return build(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(results):
    return Page((results / "report.html").read_text())


def markdown_tables(text):
    tables, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split(" |")])
        elif rows:
            tables.append(rows)
            rows = []
    return tables


# ------------------------------------------------------------------------------- numbers as told


def test_the_overview_shows_the_records_numbers_rounded(page):
    header, *rows = page.table("Site", "Role")
    assert header[3:7] == ["Before training", "Final model", "Change", "Best model"]
    by_site = {row[0]: row for row in rows}
    for site in ("site-1", "site-2", "site-4"):
        before, after, change, best = by_site[site][3:7]
        assert float(before) == round(dice_of(site, 0), 3)
        assert float(after) == round(dice_of(site, 6), 3)
        assert float(best) == round(dice_of(site, 5), 3)
        gained = float(change.replace("−", "-"))
        assert gained == pytest.approx(dice_of(site, 6) - dice_of(site, 0), abs=5e-4)
    assert by_site["site-3"][3:7] == ["–", "withheld", "–", "–"]
    mean = by_site["Mean of the training sites"]
    expected = (dice_of("site-1", 6) + dice_of("site-2", 6)) / 2
    assert float(mean[4]) == pytest.approx(expected, abs=5e-4)


def test_the_evaluation_table_shows_mean_spread_and_cases(page):
    job = Job()
    header, *rows = page.table("Site", "Cases", "Empty")
    assert header[3:] == ["Dice", "IoU", "HD95", "Dice", "IoU"]
    for row in rows:
        metrics = job.metrics(row[0], 6)
        if row[0] == "site-3":
            assert row[3:] == ["withheld"] * 5
            continue
        dice = metrics[0]
        assert (int(row[1]), int(row[2])) == (dice.cases, dice.empty)
        for shown, metric in zip(row[3:], metrics, strict=True):
            digits = 2 if metric.metric == "hd95" else 3
            unit = " mm" if metric.metric == "hd95" else ""
            assert shown == f"{metric.mean:.{digits}f} ± {metric.std:.{digits}f}{unit}"


def test_the_cost_tables_show_bytes_time_and_memory(page):
    rows = {row[0]: row for row in page.table("Site", "Rounds", "Received")[1:]}
    assert rows["site-1"][1:4] == ["6 of 6", "1.81 MB", "906.2 kB"]
    assert rows["site-2"][1] == "5 of 6"
    for shown, exact in zip(
        rows["All sites"][4:],
        (23 * BYTES_DOWN, 17 * BYTES_UP, 23 * BYTES_DOWN + 17 * BYTES_UP),
        strict=True,
    ):
        assert float(shown.removesuffix(" MB")) == pytest.approx(exact / 1e6, abs=0.05)
    training = {row[0]: row for row in page.table("Site", "Cases", "Slices")[1:]}
    assert training["site-1"][1:3] == ["56", "412"]
    seconds = sum(0.071 * 412 + 0.4 * r for r in range(6))
    assert training["site-1"][5] == f"{int(seconds // 60)} min {round(seconds % 60):02d} s"
    for size in ("1.20 GB", "1.19 GB", "1.18 GB"):  # of each phase, below its time
        assert size in page.text


def test_markdown_and_page_hold_the_same_tables(results, page):
    shown = markdown_tables((results / "report.md").read_text())
    for table in page.tables:
        first = next(t for t in shown if [c.split(" (")[0] for c in t[0]] == table[0])
        shown.remove(first)
        for mine, theirs in zip(first[2:], table[1:], strict=True):
            plain = [re.sub(r"\\(.)", r"\1", c).replace("**", "").split(" (")[0] for c in mine]
            assert plain == theirs


def test_the_tiles_say_numbers_and_what_they_measure(page):
    before, after = ((dice_of("site-1", r) + dice_of("site-2", r)) / 2 for r in (0, 6))
    cases = CASES["site-1"] + CASES["site-2"]
    assert (
        f"Mean Dice, training sites {after:.3f} {before:.3f} before training; 2 of 3 sites, "
        f"{cases} validation cases" in page.text
    )
    assert f"Dice, unseen site {dice_of('site-4', 6):.3f} " in page.text
    assert "site-4, 12 cases, never trained" in page.text
    assert "Segment Anything" in page.text


def test_the_page_says_which_build_ran_and_what_of_it_is_unknown(tmp_path):
    records = Job().records()
    records[0] |= {"fedfms_revision": "74479d9", "image": None}
    text = (build(tmp_path, records=records) / "report.md").read_text()
    assert "- fedfms, commit: `74479d9`" in text
    assert "- container image, digest: `unknown`" in text


def test_missed_rounds_are_told_in_plain_words(page):
    _, row = page.table("Round", "Site", "Why")
    assert row == [
        "2",
        "site-2",
        "The site's training process failed: its trainer was killed in the middle of its work, "
        "most likely because it ran out of memory.",
    ]


def test_curves_go_through_every_recorded_dice(results):
    """The markers of one curve, read back from the drawing, lie on a straight map of the values."""
    html = (results / "report.html").read_text()
    figure = html[html.index("Dice by round") :]
    figure = figure[: figure.index("</svg>")]
    groups = re.findall(
        r"<g clip-path[^>]*>(.*?)</g>|<g>\s*((?:<use [^>]*/>\s*)+)</g>", figure, re.S
    )
    curves = [re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', "".join(g)) for g in groups]
    curve = next(c for c in curves if len(c) == 7)  # site-1: rounds 0 to 5 and the final model
    y = [float(point[1]) for point in curve]
    dice = [dice_of("site-1", r) for r in range(7)]
    slope = (y[6] - y[0]) / (dice[6] - dice[0])
    for value, position in zip(dice, y, strict=True):
        assert position == pytest.approx(y[0] + slope * (value - dice[0]), abs=0.01)


def test_a_curve_goes_on_over_rounds_in_which_nobody_evaluates(tmp_path):
    recipe = dataclasses.replace(RECIPE, evaluate_every=3)
    html = (build(tmp_path, Job(recipe=recipe, missed={})) / "report.html").read_text()
    figure = html[html.index("Dice by round") :]
    figure = figure[: figure.index("</svg>")]
    lines = re.findall(r'<path d="(M[^"]*)" style="fill: none;[^"]*stroke-width: 1\.8', figure)
    curves = [line for line in lines if line.count("L") == 2]  # rounds 0, 3 and the final model
    assert len(lines) == len(curves) == 3 and all(line.count("M") == 1 for line in curves)
    page = Page(html)
    assert "evaluate_every" in page.text
    assert "Sites evaluate before training and every 3 rounds." in page.text


def test_rounds_are_whole_also_where_there_was_one(tmp_path):
    html = (build(tmp_path, Job(rounds=1, missed={})) / "report.html").read_text()
    figure = html[html.index("Training loss by round") :]
    figure = figure[: figure.index("</svg>")]
    ticks = re.findall(r"<text[^>]*text-anchor: middle[^>]*>([^<]*)</text>", figure)
    assert [tick for tick in ticks if re.fullmatch(r"[\d.\u2212-]+", tick)] == ["0"]


def test_two_classes_have_a_row_each(tmp_path):
    recipe = dataclasses.replace(RECIPE, classes=("anterior", "posterior"))
    results = build(tmp_path, Job(recipe=recipe))
    page = Page((results / "report.html").read_text())
    rows = page.table("Site", "Class")[1:]
    assert [row[:2] for row in rows[:2]] == [["site-1", "anterior"], ["site-1", "posterior"]]
    assert float(rows[1][4].split(" ")[0]) == round(dice_of("site-1", 6, 1), 3)


def test_sites_of_other_classes_have_a_table_of_each_class(tmp_path):
    recipe = dataclasses.replace(RECIPE, classes=("anterior", "posterior"))
    job = Job(recipe=recipe, withheld=(), not_annotated={"site-1": ("posterior",)})
    results = build(tmp_path, job)
    page = Page((results / "report.html").read_text())
    first, second = (t for t in page.tables if t[0][:2] == ["Site", "Role"])
    by_site = {row[0]: row for row in second[1:]}
    assert by_site["site-1"][4] == "not annotated"
    assert float(by_site["Mean of the training sites"][4]) == pytest.approx(
        (dice_of("site-2", 6, 1) + dice_of("site-3", 6, 1)) / 2, abs=5e-4
    )
    assert float({row[0]: row for row in first[1:]}["Mean of the training sites"][4]) == (
        pytest.approx(sum(dice_of(f"site-{n}", 6) for n in (1, 2, 3)) / 3, abs=5e-4)
    )
    assert "Not all scores are of the same classes" in page.text
    assert "Dice by site, posterior" in page.text and "Dice by round, posterior" in page.text
    assert "its own training slices, over the classes that it annotates." in page.text
    together = [(dice_of(s, 6) + dice_of(s, 6, 1)) / 2 for s in ("site-2", "site-3")]
    mixed = (dice_of("site-1", 6) + sum(together)) / 3  # of one class here and of two there
    assert f"{mixed:.3f}" not in page.text
    rows = page.table("Site", "Class")[1:]
    assert rows[1][:3] == ["site-1", "posterior", "not annotated at this site"]
    markdown = (results / "report.md").read_text()
    assert "not annotated at this site" in markdown and "### Dice by site, posterior" in markdown


def test_a_column_over_fewer_sites_says_so_and_best_is_compared_over_the_same(tmp_path):
    job = Job(withheld=(), missed={}, no_best={"site-3": "no answer within 600 s"})
    results = build(tmp_path, job)
    text = (results / "report.md").read_text()
    total = next(line for line in text.splitlines() if line.startswith("| **Mean of the training"))
    same = (dice_of("site-1", 6) + dice_of("site-2", 6)) / 2
    assert f"(2 of 3 sites; final model there {same:.3f})" in total
    assert total.count("2 of 3 sites") == 1
    page = Page((results / "report.html").read_text())
    assert page.table("Round", "Site", "Why")[1:] == [
        ["best model", "site-3", "no answer within 600 s"]
    ]


def test_a_site_that_never_answered_is_not_among_those_that_trained(tmp_path):
    why = "SiteDataError (unknown-label-values); the site's own log has the details"
    job = Job(missed={(number, "site-2"): why for number in range(6)}, withheld=())
    page = Page((build(tmp_path, job) / "report.html").read_text())
    assert "Segment Anything fine-tuned by 2 of 3 sites: hippocampus" in page.text
    assert "site-2 never answered a round; nothing of it is in this model." in page.text


# --------------------------------------------------------------------------------- runs cut short


def test_an_interrupted_run_says_so_first(tmp_path):
    results = build(tmp_path, Job(rounds=3, models=(), status="aborted"))
    page = Page((results / "report.html").read_text())
    assert "The job was stopped on request: 3 of 6 rounds were completed." in page.text
    assert "There is no final evaluation of site-1, site-2 and site-4" in page.text
    assert page.table("Site", "Role")[0][4] == "Last known"
    assert "final evaluation; " not in page.text


def test_a_run_that_ended_before_its_first_round_has_a_report(tmp_path):
    results = build(tmp_path, records=Job().records()[:1])
    page = Page((results / "report.html").read_text())
    assert "No training site reported a Dice after training." in page.text
    assert "The records end before the job did" in page.text
    assert "svg" not in page.tags


def test_a_job_that_only_evaluates_has_a_report(tmp_path):
    job = Job(rounds=0, models=("final",))
    results = build(tmp_path, job)
    page = Page((results / "report.html").read_text())
    assert "Segment Anything evaluated at 4 sites" in page.text


def test_rendering_again_gives_the_same_bytes(results):
    first = {name: (results / name).read_bytes() for name in ("report.html", "report.md")}
    render(results)
    assert first == {name: (results / name).read_bytes() for name in first}


# ------------------------------------------------------------------------------ safe and offline


def test_the_page_loads_nothing_from_outside_and_runs_nothing(page, results):
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    for tag, name, value in page.attributes:
        if name in loading:
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
        assert not name.startswith("on")
    assert not {"script", "iframe", "link", "object", "embed"} & set(page.tags)
    text = (results / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    policy = [v for t, n, v in page.attributes if t == "meta" and n == "content"]
    assert any("default-src 'none'" in value for value in policy)


def test_the_ids_of_the_figures_do_not_collide(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))


def test_pictures_are_embedded_whole(page, results):
    sources = [v for t, n, v in page.attributes if t == "img" and n == "src"]
    embedded = {base64.b64decode(source.split(",", 1)[1]) for source in sources}
    assert embedded == {p.read_bytes() for p in (results / "pictures").iterdir()}


def test_the_key_has_the_colours_of_the_overlays(page):
    from fedfms.training import overlay

    colours = {line.meaning: line.colour for line in picture_key(["disc"])}
    for what, colour in (
        ("annotation", overlay.TRUTH_COLOUR),
        ("prediction", overlay.PREDICTION_COLOUR),
    ):
        assert colours[what] == "#{:02x}{:02x}{:02x}".format(*colour)
    drawn = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in overlay.CLASS_COLOURS]
    by_name = {line.meaning: (line.colour, line.style) for line in picture_key(["disc", "the_cup"])}
    assert by_name["annotation"][1] == "dashed" and by_name["prediction"][1] == "solid"
    assert (by_name["disc"][0], by_name["the cup"][0]) == (drawn[0], drawn[1])


def test_names_and_reasons_are_shown_and_never_run(tmp_path):
    evil = '<script>alert("1")</script>'
    job = Job(missed={(1, "site-2"): f"{evil} | **bold** ` [x](y)"})
    records = job.records()
    records[0]["name"] = f"{evil}"
    records[0]["sites"].append('site"><img src=x onerror=alert(1)>')
    results = build(tmp_path, job, records)
    page = Page((results / "report.html").read_text())
    assert "script" not in page.tags
    assert not any(name == "onerror" for _, name, _ in page.attributes)
    assert evil in page.text and 'site"><img src=x onerror=alert(1)>' in page.text
    markdown = (results / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown
    missed = next(t for t in markdown_tables(markdown) if t[0] == ["Round", "Site", "Why"])
    row = next(r for r in missed if r[1] == "site-2")
    assert row[0] == "1" and r"\*\*bold\*\*" in "|".join(row)


# ----------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        (
            "TrainerError (trainer-died); the site's own log has the details",
            "was killed in the middle",
        ),
        ("SiteDataError (unpaired-files); the site's own log", "images or labels"),
        ("DoorClosed (non-finite); the site's own log", "own policy"),
        ("ContributionRefused (non-finite); more", "NaN or infinity"),
        ("the trainer reports TrainingError (out-of-memory, RuntimeError)", "out of memory"),
        ("other-backbone", "another SAM checkpoint"),
        ("no answer within 600 s", "no answer within 600 s"),
        (None, "No answer"),
    ],
)
def test_reasons_in_plain_words(reason, says):
    assert says in words.plain_reason(reason)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.score(0.87349), "0.873"),
        (words.score(1.0), "1.000"),
        (words.score(None), "–"),
        (words.change(-0.0125), "−0.013"),
        (words.with_spread(2.345, 0.5, "hd95"), "2.35 ± 0.50"),
        (words.with_spread(2.345, 0.5, "hd95", "px"), "2.35 ± 0.50 px"),
        (words.size(0), "0 B"),
        (words.size(999), "999 B"),
        (words.size(42_428_928), "42.4 MB"),
        (words.size(9_999_600), "10.0 MB"),
        (words.size(999_990_000), "1.00 GB"),
        (words.duration(8.26), "8.3 s"),
        (words.duration(59.96), "1 min 00 s"),
        (words.duration(252), "4 min 12 s"),
        (words.duration(7499), "2 h 05 min"),
        (words.listing(["a"]), "a"),
        (words.listing(["a", "b", "c"]), "a, b and c"),
        (words.numerals(1, "case"), "1 case"),
        (words.count(93177216), "93\u202f177\u202f216"),
    ],
)
def test_numbers_as_a_reader_sees_them(shown, expected):
    assert shown == expected


def test_what_the_guard_found_is_told_first_and_with_its_figure(tmp_path):
    job = Job(judged={(1, "site-2"): 98.0})
    page = render_page(tmp_path, job)
    assert "The guard found answers of site-2 that stand out, in 1 round" in page.text
    assert "site-2's answer is 98 times as long as the others let expect" in page.text
    assert "the longest was 98 times as long" in page.text
    quiet = render_page(tmp_path / "quiet", Job(judged={(1, "site-2"): 1.2}))
    assert "stand out" not in quiet.text
    assert "the longest was 1.2 times as long" in quiet.text
    rows = (tmp_path / "results" / "guard.csv").read_text().splitlines()
    assert rows[1].startswith("1,site-2,98.0,1.0,")


def render_page(folder, job):
    written = job.write(folder / "job")
    collect(written, folder / "results")
    render(folder / "results")
    return Page((folder / "results" / "report.html").read_text())
