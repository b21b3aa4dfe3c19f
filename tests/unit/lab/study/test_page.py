"""study.html, study.md, study.csv and study.tex as a reader and a browser find them."""

import base64
import csv
import dataclasses
import os
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import pytest
from run_writer import SITES, StudyFolder, bend, with_facts

from fedfms.errors import FederationError
from fedfms.report import words as shown
from fedfms_lab.study.page.write import write_answer

FILES = ("study.html", "study.md", "study.csv", "study.tex")
SMALL = {"cases": 9, "rounds": 5, "picture_side": 40}


class Page(HTMLParser):
    """Tables with all their text, links, pictures, tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.titles, self.words, self.tags, self.attributes = [], [], [], [], []
        self._cell, self._skip = None, 0
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "div" and ("role", "region") in attrs:
            self.titles.append(dict(attrs)["aria-label"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "style":
            self._skip += 1

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append([text.strip() for text in self._cell if text.strip()])
            self._cell = None
        elif tag == "style":
            self._skip -= 1

    def handle_data(self, data):
        if not self._skip:
            self.words.append(data)
            if self._cell is not None:
                self._cell.append(data)

    def table(self, title):
        return self.tables[self.titles.index(title)]


def write(folder, **changes):
    StudyFolder(**(SMALL | changes)).write(folder)
    write_answer(folder)
    return folder


def read(folder):
    return Page((folder / "study.html").read_text())


def rows_of(folder):
    with (folder / "study.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("study") / "s")


@pytest.fixture(scope="module")
def page(folder):
    return read(folder)


@pytest.fixture(scope="module")
def rows(folder):
    return rows_of(folder)


# ---------------------------------------------------------------------- numbers as study.csv has


def the_value(rows, **wanted):
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return float(found[0]["value"])


HOW = {
    "federated": "federated",
    "centralized": "central",
    "one site alone": "local",
    "one site alone, best": "local, best model",
}


@pytest.mark.parametrize("metric", ["dice", "iou", "hd95"])
@pytest.mark.parametrize("role", ["train", "unseen"])
def test_every_cell_of_a_score_table_is_its_row_of_the_csv(page, rows, role, metric):
    name = {"dice": "Dice", "iou": "IoU", "hd95": "HD95"}[metric]
    where = {"train": "training sites", "unseen": "unseen sites"}[role]
    header, *body = page.table(f"{name} at {where}")
    assert [cell[0] for cell in header] == ["Method", *SITES, "Mean", "Worst site"]
    assert len(body) == (6 if role == "train" else 8)
    digits, unit = (2, " mm") if metric == "hd95" else (3, "")
    for (method, how), *cells in body:
        key = {"table": "scores", "method": method.lower(), "regime": HOW[how], "role": role}
        key["metric"] = metric
        for site, cell in zip((*SITES, ""), cells[:-1], strict=True):
            mean = the_value(rows, **key, site=site, statistic="mean")
            spread = the_value(rows, **key, site=site, statistic="standard deviation")
            assert cell == [f"{mean:.{digits}f} ± {spread:.{digits}f}{unit}"]
        value, site = cells[-1]
        worst = the_value(rows, **key, site=site, statistic="worst site")
        assert value == f"{worst:.{digits}f}{unit}"


def signed(value):
    return f"{value:+.3f}".replace("-", "−")


def test_every_cell_of_the_table_of_differences_is_its_row_of_the_csv(page, rows):
    _, *body = page.table("Federated minus other training")
    assert len(body) == 12
    regimes = {
        "centralized": "federated - central",
        "own site alone": "federated - local",
        "other sites alone": "federated - local",
        "best other site alone": "federated - local, best model",
        "federated FedSAM": "federated - federated fedsam",
    }
    for (method,), (minus, *tag), (where, *_), difference, interval, p, holm, *counts in body:
        key = {
            "table": "gaps",
            "method": method.lower(),
            "regime": regimes[minus],
            "role": {"training sites": "train", "unseen sites": "unseen"}[where],
            "site": "",
        }
        assert difference == [signed(the_value(rows, **key, statistic="mean difference"))]
        low, high = (the_value(rows, **key, statistic=f"interval {end}") for end in ("low", "high"))
        assert interval == [f"{signed(low)} to {signed(high)}"]
        assert tag == (["tested"] if minus in ("own site alone", "other sites alone") else [])
        for cell, statistic in ((p, "p"), (holm, "p after Holm")):
            if not tag:
                assert cell == ["–"]
                continue
            value = the_value(rows, **key, statistic=statistic)
            assert cell == ["<0.001" if value < 0.0005 else f"{value:.3f}"]
        for cell, statistic in zip(counts, ("seeds", "patients", "cases"), strict=True):
            assert int(cell[0]) == the_value(rows, **key, statistic=statistic)


COUNTS = {"runs", "cases", "patients", "seeds", "without_value", "rounds", "count", "sites"}


def shown_forms(rows):
    """Every way in which a value of the csv may stand on the page."""
    forms = set()
    for row in rows:
        value, unit = float(row["value"]), row["unit"]
        if unit == "B":
            forms.add(shown.size(value))
        elif unit == "s":
            forms.add(shown.duration(value))
        elif unit in ("mm", "px"):
            forms |= {f"{value:.2f}", f"{value:.2f} {unit}"}
        elif unit == "rounds" or {row["metric"], row["statistic"]} & COUNTS:
            forms |= {f"{value:.0f}", f"{value:.1f}"}
        elif row["statistic"].startswith("p"):
            forms |= {f"{value:.3f}", "<0.001" if value < 0.0005 else "", f"{value:.0f}"}
        elif row["statistic"] == "share saved":
            forms |= {f"{100 * value:.1f} %".replace("-", "−"), f"{100 * abs(value):.1f} %"}
        forms |= {f"{value:.3f}", signed(value), f"{abs(value):.3f}"}
        forms.add(row["n"])
    return forms - {""}


NUMBER = re.compile(
    r"\d+ h \d\d min|\d+ min \d\d s|<0\.001|"
    r"[+−]?(?<![\w.-])\d+(?:\.\d+)?(?: (?:kB|MB|GB|B|s|%|mm|px))?(?![\w-])"
)


def test_every_number_of_every_table_is_in_the_csv(page, rows):
    """Whatever the table: no number is computed on the way to the page."""
    forms = shown_forms(rows)
    checked = 0
    for title, table in zip(page.titles, page.tables, strict=True):
        if title in ("Runs", "Data of each site"):
            continue  # hashes, and facts of run.json
        for row in table[1:]:
            for cell in row[1:]:
                for text in cell:
                    for found in NUMBER.findall(re.sub(r"site-\d", "", text)):
                        assert found in forms, (title, row[0], text, found)
                        checked += 1
    assert checked > 500


def test_every_number_of_the_answers_and_tiles_is_in_the_csv(folder, page, rows):
    html = (folder / "study.html").read_text()
    top = html[html.index('<div class="answers">') : html.index("<h2>Dice by method")]
    text = unescape(re.sub(r"<[^>]*>", " ", top))
    text = text.replace("95 % interval", "").replace("more than 0.10 Dice", "")
    text = re.sub(r"site-\d", "", text)
    forms = shown_forms(rows)
    found = NUMBER.findall(text)
    assert len(found) > 30
    counts = {"4", "3", "2", "1", "12"}  # of sites and pairs of sites, whose n the csv has as well
    assert [number for number in found if number not in forms | counts] == []


def test_the_answers_say_how_far_federated_is_below_and_where_local_fails(page, rows):
    below = the_value(
        rows,
        table="gaps",
        method="fedmsa",
        regime="federated - central",
        role="unseen",
        site="",
        statistic="mean difference",
    )
    assert below < 0
    assert re.search(
        rf"At unseen sites {signed(below)} Dice \([^)]*\) against centralized", page.text
    )
    fails = the_value(
        rows,
        table="local",
        method="fedmsa",
        statistic="pairs of sites more than 0.1 below federated",
    )
    assert (
        f"fails (more than 0.10 Dice below federated training on the same cases) in {fails:.0f}"
        in (page.text)
    )


def test_the_table_of_savings_names_the_method_that_moves_less(page):
    _, *body = page.table("What federated FedMSA saves against FedSAM")
    moved = [["Bytes a site and round, both ways"], ["84.9 MB"], ["749.9 MB"], ["88.7 %"]]
    assert body[0] == moved


def test_the_heat_table_is_darkest_where_the_dice_is_highest(folder, page):
    html = (folder / "study.html").read_text()
    cells = re.findall(r'class="n shade-(\d)">([\d.]+)', html)
    values = [(float(dice), int(shade)) for shade, dice in cells]
    assert len(values) == 2 * (4 * 4 + 2 * 4)
    assert [shade for _, shade in sorted(values)] == sorted(shade for _, shade in values)
    assert {shade for _, shade in values} >= {0, 7}


# ------------------------------------------------------------------------------- the other forms


def markdown_tables(text):
    tables, table = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            tables.append(table)
            table = []
    return tables


def test_markdown_holds_the_same_tables_as_the_page(folder, page):
    tables = markdown_tables((folder / "study.md").read_text())
    assert len(tables) == len(page.tables)
    for mine, theirs in zip(tables, page.tables, strict=True):
        assert len(mine) == len(theirs) + 1
        for markdown, html in zip([mine[0], *mine[2:]], theirs, strict=True):
            for text, parts in zip(markdown, html, strict=True):
                plain = re.sub(r"\]\(<[^>]*>\)", "", text.replace("&nbsp;", " "))
                plain = re.sub(r"[\\`*()\[\]]|&lt;", "", plain)
                for part in parts:
                    assert re.sub(r"[*()<]|\s", "", part) in re.sub(r"\s", "", plain)


def tex_tables(text):
    """(caption, rows of cells) of each float, and that its structure is sound."""
    found = []
    for body in re.findall(r"\\begin\{table\}(.*?)\\end\{table\}", text, re.S):
        head, rest = re.split(r"\\toprule\n", body)
        columns = re.search(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", head)[1]
        inner, tail = re.split(r"\\bottomrule\n", rest)
        assert tail.strip() == r"\end{tabular}}"
        rows = []
        for line in inner.splitlines():
            if line == r"\midrule":
                continue
            assert line.endswith(r" \\")
            cells = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
            assert len(cells) == len(columns), line
            rows.append([cell.strip() for cell in cells])
        found.append((head, rows))
    return found


def check_tex(text):
    """Braces are balanced, maths is closed, and no character with a meaning stands alone."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[\\{}$&#%_,]", "", body)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    bare = re.sub(r"\\label\{[^}]*\}", "", bare)
    bare = bare.replace(r"\ifdim\width>\linewidth", "").replace(
        "{!}{%\n", ""
    )  # a table's own width
    assert re.findall(r"[#%_^<>\"|]", bare) == []
    assert body.isascii() or re.fullmatch(r"[\x00-\x7fÀ-ÿ]*", body)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}")
    return tex_tables(text)


def test_tex_holds_the_score_tables_with_the_same_rounding(folder, page):
    tables = check_tex((folder / "study.tex").read_text())
    caption, body = tables[0]
    assert "Dice at training sites" in caption and r"\label{tab:study-dice-1}" in caption
    _, *rows = page.table("Dice at training sites")
    for tex, html in zip(body[2:], rows, strict=True):
        for mine, theirs in zip(tex[1:-1], html[1:-1], strict=True):
            assert mine.replace(r" $\pm$ ", " ± ") == theirs[0]
    assert len(tables) == len(page.tables) - 2  # without the runs and the hashes of the data


# ------------------------------------------------------------------------------ safe and offline


def test_the_page_loads_nothing_and_links_only_to_the_folders_of_the_runs(page, folder):
    links = []
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if (tag, name) == ("a", "href"):
            links.append(value)
        elif name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert len(links) == 72 + 24  # each run, and the job's report of the federated ones
    for link in links:
        assert not re.match(r"[a-z]+:|/", link) and ".." not in link
        assert (folder / link).exists()
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(page.tags)
    text = (folder / "study.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    policy = [v for t, n, v in page.attributes if t == "meta" and n == "content"]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in policy


def test_the_ids_of_the_figures_do_not_collide(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))


def test_no_case_and_no_patient_is_named(folder):
    for name in FILES:
        text = (folder / name).read_text()
        assert "case-" not in text and "patient-" not in text


def test_pictures_are_of_the_federated_run_of_the_lowest_seed_with_the_site_unseen(page, folder):
    sources = [v for t, n, v in page.attributes if t == "img" and n == "src"]
    embedded = [base64.b64decode(source.split(",", 1)[1]) for source in sources]
    expected = [
        folder / f"runs/{method}-federated-without-{site}-seed-0/pictures/{site}-{number}.png"
        for method in ("fedsam", "fedmsa")
        for site in SITES[:3]
        for number in (1, 2, 3)
    ]
    assert embedded == [path.read_bytes() for path in expected]
    assert "FedMSA, site-2, unseen, seed 0" in page.text


def test_pictures_of_a_site_that_always_trained_and_nothing_that_is_no_picture(tmp_path):
    study = {"holdouts": (None,), "methods": ("fedmsa",), "regimes": ("federated",)}
    folder = StudyFolder(**SMALL, **study).write(tmp_path / "s")
    pictures = folder / "runs/fedmsa-federated-all-seed-0/pictures"
    (pictures / "site-2-2.png").write_text("<script>alert(1)</script>")
    (pictures / "site-2-10.png").write_bytes((pictures / "site-2-1.png").read_bytes())
    (pictures / "site-2-3.png").unlink()
    (pictures / "site-2-3.png").symlink_to(folder / "study.json")
    (pictures / "other-1.png").write_bytes((pictures / "site-2-1.png").read_bytes())
    write_answer(folder)
    page = read(folder)
    assert "FedMSA, site-2, trained there, seed 0" in page.text
    sources = [v for t, n, v in page.attributes if t == "img" and n == "src"]
    assert len(sources) == 3 + 2 + 3


def test_a_title_with_every_special_character_is_shown_and_never_run(tmp_path):
    evil = '<script>alert("1")</script> \\input{x} $&#%_~^{} | **b** [x](y) ∑é`'
    folder = write(
        tmp_path / "s",
        title=evil,
        methods=("fedmsa",),
        seeds=(0,),
        classes=("a_b", "c%d\\e"),
        regimes=("federated", "central"),
        pictures=(),
    )
    page = read(folder)
    assert "script" not in page.tags and evil in page.text
    assert "<script" not in (folder / "study.md").read_text()
    check_tex((folder / "study.tex").read_text())
    assert page.table("Dice of each class, unseen sites")[0][1][0] == "a b"
    assert r"c\%d\textbackslash{}e" in (folder / "study.tex").read_text()


# ------------------------------------------------------------------------ incomplete and uneven


def test_an_incomplete_study_says_so_and_shows_what_there_is(tmp_path):
    def unfinished(key):
        return key.regime == "central" or (key.regime == "federated" and key.seed > 0)

    folder = write(tmp_path / "s", methods=("fedmsa",), unfinished=unfinished, pictures=())
    page = read(folder)
    assert "This study is incomplete: 16 of 36 planned runs have finished" in page.text
    assert "fedmsa-central-without-site-1-seed-0" in page.text
    _, *body = page.table("Dice at training sites")
    assert [row[0] for row in body] == [["FedMSA", "federated"], ["FedMSA", "one site alone"]]
    assert body[0][1][1] == "1 seed" and "±" not in body[0][1][0]
    assert "±" in body[1][1][0]
    assert "This study is incomplete" in (folder / "study.md").read_text()
    assert "There is no target Dice" in page.text


def test_means_over_other_sites_are_told_apart(tmp_path):
    folder = write(
        tmp_path / "s",
        methods=("fedmsa",),
        regimes=("federated", "central"),
        unfinished=lambda key: key.regime == "federated" and key.holdout == "site-3",
        pictures=(),
    )
    page = read(folder)
    title = next(title for title in page.titles if title.startswith("Dice at unseen sites"))
    means = {row[0][1]: row[-2] for row in page.table(title)[1:]}
    assert means["federated"][1] == "3 of 4 sites"
    assert means["centralized"] == means["centralized"][:1]  # of all, which needs no remark
    assert re.search(r"centralized 0\.\d+ over 4 sites; mean of 3 sites", page.text)


def test_a_complete_study_gives_no_notice(folder, page):
    assert ("p", "class", "notice") not in page.attributes


def test_a_study_without_a_finished_run_still_has_its_page(tmp_path):
    folder = write(tmp_path / "s", unfinished=lambda key: True)
    page = read(folder)
    assert "0 of 72 planned runs have finished" in page.text
    assert "No run has finished yet" in page.text and page.tables == []
    assert {row["statistic"] for row in rows_of(folder)} == {"planned", "finished"}
    assert all((folder / name).is_file() for name in FILES)


def test_mm_and_px_stand_in_rows_of_their_own(tmp_path):
    folder = write(
        tmp_path / "s", units={"site-4": "px"}, methods=("fedmsa",), seeds=(0,), pictures=()
    )
    _, *body = read(folder).table("HD95 at unseen sites")
    federated = [row for row in body if row[0] == ["FedMSA", "federated"]]
    assert len(federated) == 2
    for row, unit, sites in zip(
        federated, ("mm", "px"), ("3 of 4 sites", "1 of 4 sites"), strict=True
    ):
        values = [cell[0] for cell in row[1:5] if cell != ["–"]]
        assert all(value.endswith(f" {unit}") for value in values)
        assert row[5][0].endswith(f" {unit}") and row[5][1] == sites
    assert federated[0][4] == ["–"] and federated[1][1:4] == [["–"]] * 3


def test_one_seed_one_method_and_a_site_of_empty_cases(tmp_path):
    folder = write(
        tmp_path / "s", seeds=(0,), methods=("fedmsa",), empty_sites=("site-2",), pictures=()
    )
    page = read(folder)
    _, *body = page.table("Dice at unseen sites")
    assert all("±" not in part for row in body for cell in row for part in cell)
    assert all(row[2] == ["–"] and row[5][1] == "3 of 4 sites" for row in body)
    assert "nothing is drawn in them: 9 at site-2" in page.text
    _, *body = page.table("False alarms at unseen sites")
    assert [row[1] for row in body] == [["0.0 %"]] * 3
    check_tex((folder / "study.tex").read_text())


def test_data_that_changed_between_runs_is_told(tmp_path):
    folder = StudyFolder(**(SMALL | {"pictures": ()}), methods=("fedmsa",), seeds=(0,)).write(
        tmp_path / "s"
    )
    run = folder / "runs/fedmsa-local-at-site-2-seed-0"
    bend(run, lambda record: with_facts(record, "site-3", manifest_sha256="f" * 64))
    run = folder / "runs/fedmsa-local-at-site-1-seed-0"
    versions = {"fedfms": "9.9", "torch": "2.13.0"}
    bend(run, lambda record: dataclasses.replace(record, versions=versions))
    write_answer(folder)
    page = read(folder)
    assert "The images or labels of site-3 changed between runs (2 states)" in page.text
    assert "did not all use the same set of versions: there are 2" in page.text
    assert len(page.table("Data of each site")) == 1 + 5


def test_each_run_is_listed_with_recipe_data_versions_and_time(page, folder):
    from fedfms_lab.study.record import read_runs

    _, *body = page.table("Runs")
    listed = {row[0][0]: row for row in body}
    for run in read_runs(folder):
        record = run.record
        row = listed[record.key.name]
        assert row[2] == [record.recipe_sha256[:12]]
        for site, facts in record.sites.items():
            assert f"{site} {facts.manifest_sha256[:12]}" in row[3][0]
        assert len(row[3]) == 1  # all have the same versions, which stand once
        assert row[4] == [shown.duration(record.seconds)]
    for site in SITES:
        assert run.record.sites[site].manifest_sha256 in page.text
    assert page.text.count("nvflare 2.9.0") == 1


def test_runs_of_several_versions_say_theirs(tmp_path):
    folder = write(tmp_path / "s", methods=("fedmsa",), seeds=(0,))
    first = next(folder.glob("runs/*/run.json"))
    first.write_text(first.read_text().replace('"nvflare": "2.9.0"', '"nvflare": "2.9.1"'))
    write_answer(folder)
    page = Page((folder / "study.html").read_text())
    shown_versions = [row[3][1] for row in page.table("Runs")[1:]]
    assert sum("nvflare 2.9.1" in versions for versions in shown_versions) == 1
    assert all("torch" in versions for versions in shown_versions)


# ----------------------------------------------------------------------------- whole or not at all


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_beside(tmp_path):
    folder = write(tmp_path / "s", methods=("fedmsa",), seeds=(0,))
    first = {name: (folder / name).read_bytes() for name in FILES}
    write_answer(folder)
    assert first == {name: (folder / name).read_bytes() for name in FILES}
    assert {path.name for path in folder.iterdir()} == {*FILES, "study.json", "runs"}


def test_a_damaged_run_leaves_the_earlier_answer_as_it_was(tmp_path):
    folder = write(tmp_path / "s", methods=("fedmsa",), seeds=(0,))
    first = {name: (folder / name).read_bytes() for name in FILES}
    run = folder / "runs/fedmsa-local-at-site-2-seed-0"
    (run / "scores.csv").write_text("site,role\nx,y\n")
    with pytest.raises(FederationError, match="remove the whole folder"):
        write_answer(folder)
    assert first == {name: (folder / name).read_bytes() for name in FILES}
    shutil.rmtree(run)
    write_answer(folder)
    assert "This study is incomplete" in (folder / "study.html").read_text()


def test_a_disk_that_is_full_leaves_the_earlier_answer_as_it_was(tmp_path, monkeypatch):
    folder = write(tmp_path / "s", methods=("fedmsa",), seeds=(0,))
    first = {name: (folder / name).read_bytes() for name in FILES}
    shutil.rmtree(folder / "runs/fedmsa-local-at-site-2-seed-0")
    flush, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == len(FILES):
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_answer(folder)
    assert first == {name: (folder / name).read_bytes() for name in FILES}
    assert {path.name for path in folder.iterdir()} == {*FILES, "study.json", "runs"}


# ------------------------------------------------------------------- means of what can be compared


def test_sites_of_other_classes_have_tables_class_by_class(tmp_path):
    folder = write(
        tmp_path / "s",
        classes=("disc", "cup"),
        methods=("fedmsa",),
        not_annotated={"site-1": ("cup",)},
    )
    page, rows = read(folder), rows_of(folder)
    for role, where in (("train", "training sites"), ("unseen", "unseen sites")):
        assert f"Dice at {where}" not in page.titles
        header, *body = page.table(f"Dice at {where}, cup")
        assert [cell[0] for cell in header][1] == "site-1"
        federated = body[0]
        assert federated[1] == ["not annotated"]
        assert federated[-2][1] == "3 of 4 sites"
        mean = the_value(
            rows,
            table="scores",
            method="fedmsa",
            regime="federated",
            role=role,
            site="",
            metric="dice",
            statistic="mean",
            **{"class": "cup"},
        )
        assert federated[-2][0].startswith(f"{mean:.3f} ")
        assert all(cell != ["not annotated"] for cell in page.table(f"Dice at {where}, disc")[1])
    said = [
        (row["class"], row["site"], row["metric"], row["value"])
        for row in rows
        if row["table"] == "classes"
    ]
    assert said == [
        ("disc", "", "in common", "1"),
        ("cup", "", "in common", "0"),
        ("cup", "site-1", "annotated", "0"),
    ]
    assert "site-1 does not annotate cup" in page.text
    assert "are of disc, which all sites scored in all runs" in page.text
    for question in ("Did federating pay?", "And against pooled images?"):
        assert " Dice of disc" in page.text.split(question)[1][:80]
    assert "more than 0.10 Dice of disc below federated training" in page.text
    assert "not annotated" in (folder / "study.tex").read_text()


def test_without_a_class_in_common_nothing_is_averaged_over_classes(tmp_path):
    folder = write(
        tmp_path / "s",
        classes=("disc", "cup"),
        methods=("fedmsa",),
        regimes=("federated", "central"),
        not_annotated={"site-1": ("cup",), "site-2": ("disc",)},
    )
    assert "There is no class that all sites scored" in read(folder).text
    assert not any(row["table"] == "scores" and row["class"] == "" for row in rows_of(folder))


def test_a_target_that_nobody_reaches_stands_in_the_table_of_communication(tmp_path):
    page = read(write(tmp_path / "s", methods=("fedmsa",), target_dice=0.99))
    _, row = page.table("Communication of federated runs")
    assert row[5:7] == [["0.990"], ["0 of 12"]]


def test_the_papers_table_is_the_table_of_slices(tmp_path):
    folder = write(tmp_path / "s", methods=("fedmsa",), paper_compat=True)
    page, rows = read(folder), rows_of(folder)
    header, *body = page.table("Dice of slices at unseen sites")
    assert [cell[0] for cell in header] == ["Method", *SITES, "Mean", "Worst site"]
    value = the_value(
        rows,
        table="scores",
        regime="federated",
        role="unseen",
        site="site-2",
        metric="dice_slice",
        statistic="mean",
    )
    assert body[0][2][0].startswith(f"{value:.3f}")
    assert "an empty slice counts" in page.text
    assert "Scores of slices" in (folder / "study.md").read_text()
    assert "Dice of slices" in (folder / "study.tex").read_text()


# ------------------------------------------------------------------------------- the three answers


def answers_of(page_text):
    """{question: sentences} of a page of one method."""
    questions = re.findall(
        r"Did federating pay\?|For whom\?|And against pooled images\?|At what cost\?", page_text
    )
    parts = re.split("|".join(map(re.escape, questions)), page_text)
    return dict(zip(questions, parts[1:], strict=True))


@pytest.mark.parametrize(
    ("better", "told", "whom"),
    [
        (0.05, "At training sites yes: +0.0", "3 of 3 training sites are ahead ("),
        (-0.05, "At training sites no, it cost: −0.0", "3 of 3 training sites are not ahead ("),
        (0.0, "At training sites not shown: ", ""),
    ],
)
def test_the_first_answer_follows_the_interval(tmp_path, better, told, whom):
    study = StudyFolder(**SMALL, methods=("fedmsa",), pictures=(), holdouts=SITES[:1])
    at_home = {}
    for key in study.run_keys():
        if key.regime == "local":
            rows = [row for row in study.scores(key) if row.role == "train"]
            at_home.update({(key.seed, row.case): row.dice for row in rows})
    for key in study.run_keys():
        if key.regime == "federated":
            for place, row in enumerate(study.scores(key)):
                if row.role == "train":  # as the site alone, but for what is better, and the seed
                    dice = at_home[key.seed, row.case] + better + 0.002 * (key.seed - 1)
                    study.scores(key)[place] = dataclasses.replace(row, dice=dice)
    folder = study.write(tmp_path / "s")
    write_answer(folder)
    answers = answers_of(read(folder).text)
    assert told in answers["Did federating pay?"]
    assert " against each site's own model (95 % interval" in answers["Did federating pay?"]
    assert f"Against each site's own model {whom}" in answers["For whom?"]
    assert (
        "A site receives 42.4 MB and sends 42.4 MB in each of 5 rounds" in answers["At what cost?"]
    )


def test_with_one_seed_nothing_is_said_to_have_paid(tmp_path):
    folder = write(tmp_path / "s", methods=("fedmsa",), seeds=(0,), pictures=())
    page = read(folder)
    assert "At training sites cannot be said: " in page.text and "no interval; " in page.text
    assert "There is no p: it takes three seeds" in page.text
    assert "*" not in "".join(
        text for table in page.tables for row in table for c in row for text in c
    )


def test_two_seeds_stand_with_both_values(tmp_path):
    folder = write(tmp_path / "s", methods=("fedmsa",), seeds=(0, 1), pictures=())
    page, rows = read(folder), rows_of(folder)
    _, federated, *_ = page.table("Dice at training sites")
    mean, both = federated[1]
    key = {
        "table": "scores",
        "regime": "federated",
        "role": "train",
        "site": "site-1",
        "metric": "dice",
    }
    values = [the_value(rows, **key, statistic=f"{name} seed") for name in ("first", "second")]
    assert both == " and ".join(f"{value:.3f}" for value in values)
    assert mean == f"{sum(values) / 2:.3f}"


def test_every_regime_and_the_rates_that_were_tried_have_their_rows(tmp_path):
    regimes = (
        "federated",
        "central-matched",
        "central",
        "local",
        "ensemble",
        "zero-shot",
        "scratch",
    )
    study = StudyFolder(
        **SMALL,
        methods=("fedmsa",),
        regimes=regimes,
        strategies=("prox",),
        holdouts=SITES[:2],
        seeds=(0, 1, 2),
        pictures=(),
    )
    study.rates = (0.001, 0.003)
    folder = study.write(tmp_path / "s")
    write_answer(folder)
    page = read(folder)
    _, *body = page.table("Dice at training sites")
    assert [row[0][1] for row in body] == [
        "federated",
        "federated (prox)",
        "centralized with matched steps",
        "centralized",
        "one site alone",
        "ensemble of sites alone",
        "zero-shot",
        "centralized from scratch",
    ]
    _, *tried = page.table("Learning rates")
    assert len(tried) == 2 * 5 + 4 + 2 + 1  # those with folds, sites alone; of the writer: all
    assert all(sum("taken" in cell for cell in row) == 1 for row in tried)
    assert "Each way to train chose its learning rate" in page.text
    forms = shown_forms(rows_of(folder))
    assert all(cell[0] in forms for row in tried for cell in row[2:])
