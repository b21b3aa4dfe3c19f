"""The page's words and numbers, read out of its HTML; how it looks was judged with a browser."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser

import pytest
from pretended_runs import (
    JOB_ID,
    NOW,
    SITES,
    complete,
    disturbed,
    healthy,
    hundred,
    several,
    state,
)

from fedfms.records.schema import JobDone
from fedfms.watch.known import Known, RunNow
from fedfms.watch.page import Pages, make
from fedfms.watch.view import span_between


def page(known: Known, path: str = "/") -> str:
    answer = make(path, known, NOW)
    assert answer is not None
    return answer.body


def words(source: str) -> str:
    """What a person reads, tags left out."""
    body = re.sub(r"<(style|script|head).*?</\1>", "", source, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def order(source: str) -> list[str]:
    """Sites in the order of the tables."""
    return re.findall(r'<th scope="row">([\w-]+)', source)


def test_a_run_that_goes_well() -> None:
    read = words(page(healthy()))
    assert "Segment Anything learns optic disc and optic cup" in read
    assert "Round 6 of 12 runs: 1 of 4 sites have answered." in read
    assert "Rounds done 5 of 12 round 6 runs for 61 s" in read
    assert "Time left 19 to 23 min ends about 04:18 UTC to 04:22 UTC" in read
    assert "86 of 120 steps" in read and "210 of 260 slices" in read
    assert "Sites 4 of 4 are there and take part" in read
    assert "Nothing out of the ordinary." in read
    assert page(healthy()).count('class="notice') == 1  # the hidden one


def test_numbers_of_a_site_are_its_own() -> None:
    row = page(healthy()).partition('<th scope="row">site-2</th>')[2].partition("</tr>")[0]
    read = words(row)
    # five answered rounds of 42,428,928 bytes in each direction; a peak of 10.7 GB; 180 s a round
    for value in ("trains", "40 of 120 steps", "now", "0.825", "0.26", "3 min", "212.1 MB"):
        assert value in read, value
    assert "10.7 GB" in read and "GPU" in read
    assert 'width="33"' in row  # the bar: 40 of 120


def test_what_was_heard_of_sites_grows_older_while_the_server_is_silent() -> None:
    known = healthy()
    read = []
    for silent in (0.0, 600.0):
        (run,) = known.runs
        told = dataclasses.replace(run, event_at=NOW - silent)
        read.append(words(page(dataclasses.replace(known, runs=(told,)))))
    assert "10 min ago" not in read[0]
    assert read[1].count("10 min ago") == len(SITES)


def test_what_is_wrong_is_said_and_comes_first() -> None:
    source = page(disturbed())
    read = words(source)
    assert order(source) == ["site-2", "site-3", "site-4", "site-1"]
    assert "The run waits: it needs 2 sites, and site-2 and site-3 are gone." in read
    assert "site-2 lost the GPU" in read
    assert "site-2's certificate ends in 20 days" in read
    assert "site-4's certificate has ended" in read
    assert "not counted while the run waits" in read
    assert "It ran out of memory (out-of-memory). Ask the site for a smaller micro_batch" in read
    assert "is gone, for 3 min" in read and "4 min ago" in read
    assert "Clinic hours until 18:00." in read
    news = read.partition("What happened")[2]
    assert "site-2's FLARE job process ended (exit code -9, killed); it is started again." in news
    assert "site-2 takes part again, in round 2." in news
    assert "site-3 missed round 5: the server does not hear from it." in news
    assert news.index("The run waits") < news.index("site-3 is gone") < news.index("exit code -9")


def test_of_a_hundred_sites_the_worst_are_shown_and_the_others_behind_a_click() -> None:
    source = page(hundred())
    shown, _, behind = source.partition("<details>")
    assert len(order(source)) == 100 == len(set(order(source)))
    assert len(order(shown)) == 12
    assert "The other 88 sites, with which nothing is wrong" in words(behind)
    gone = {one.name for one in hundred().runs[0].event.now if one.phase == "gone"}  # type: ignore[union-attr]
    assert gone and set(order(shown)[: len(gone)]) == gone
    read = words(source)
    assert f"{len(gone)} gone" in read
    assert "12 sites" not in read  # who missed the round is named, not only counted
    assert "hospital-041, hospital-042, hospital-043 and 9 others missed round 4" in read
    assert "median of all sites" in read
    assert len(source) < 200_000


def test_a_complete_run_says_what_to_do_now() -> None:
    read = words(page(complete()))
    assert (
        f"The run is complete. Its model and its report come with: fedfms fetch {JOB_ID[:8]}"
        in read
    )
    assert "Took" in read and "Time left" not in read
    assert "trains" not in read  # nobody does any more


def test_a_run_that_failed_says_why() -> None:
    run = healthy().runs[0]
    why = JobDone(status="failed", reason="deployment policy violation: 1 of 2", time=NOW - 5)
    over = dataclasses.replace(
        run, state=state("FINISHED:EXECUTION_EXCEPTION"), records=(*run.records, why)
    )
    read = words(page(Known((over,), True)))
    assert "The run failed." in read and "fedfms fetch" in read
    assert "Fewer sites were left than the job needs" in read


def test_several_runs_are_a_list_first_and_a_page_each() -> None:
    source = page(several())
    links = re.findall(r'href="(run/[\w-]+/)"', source)
    assert len(links) == 3
    read = words(source)
    assert "5 of 12 rounds, 19 to 23 min left" in read
    assert "waits" in read and "stopped on request" in read
    for link in links:
        assert 'href="../../"' in page(several(), f"/{link}")
    assert make("/run/00000000-0000-0000-0000-000000000000/", several(), NOW) is None


def test_the_part_for_the_script_is_the_same_as_in_the_page() -> None:
    for known in (healthy(), disturbed(), several()):
        whole, part = page(known), page(known, "/now")
        main = re.search(r"<main>.*</main>", whole, re.DOTALL)
        assert main is not None and main[0] in part
        assert "<script" not in part


def test_it_loads_nothing_and_works_without_javascript() -> None:
    source = page(healthy())
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", source) == []
    assert re.search(r"url\((?!data:|#)", source) is None
    assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in source
    hidden = re.findall(r"<(\w+)[^>]*\shidden[ >]", source)
    assert hidden == ["p"]  # the word about a lost connection, which only the script can know


class _Open(HTMLParser):
    """Which elements are open; complains of one that closes another."""

    VOID = frozenset({"meta", "link", "br", "path", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("known", [healthy(), disturbed(), hundred(), complete(), several()])
def test_every_element_is_closed_where_it_was_opened(known: Known) -> None:
    parser = _Open()
    parser.feed(page(known))
    assert parser.open == []


def test_what_others_wrote_stays_text() -> None:
    evil = "<script>alert(1)</script>"
    known = Known((RunNow(state(name=evil)),), True, trouble=evil)
    source = page(known)
    assert evil not in source
    assert html.escape(evil) in source


def test_before_the_server_has_answered_there_is_a_page() -> None:
    read = words(page(Known(one=True, trouble="cannot connect; start the server")))
    assert "The server does not answer: cannot connect; start the server." in read
    assert "Asking the server" in read


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.0, 1.0, "a moment"),
        (41.0, 58.0, "40 to 60 s"),
        (700.0, 720.0, "about 12 min"),
        (720.0, 1080.0, "12 to 18 min"),
        (80.0, 130.0, "1 to 2 min"),
        (5400.0, 9000.0, "1.5 to 2.5 h"),
    ],
)
def test_a_range_of_time_is_as_exact_as_it_can_be(low: float, high: float, text: str) -> None:
    assert span_between(low, high) == text


def test_a_page_is_made_once_a_second_whoever_asks() -> None:
    asked = []

    def known() -> Known:
        asked.append(1)
        return healthy()

    pages = Pages(known)
    first = pages("/")
    assert pages("/") is first and len(asked) == 1
    assert pages("/now") is not None and len(asked) == 2
    assert pages("/etc/passwd") is None and pages("/run/../") is None and len(asked) == 2
    assert pages(f"/run/{JOB_ID}/") is not None
    assert SITES[0] in first.body  # type: ignore[union-attr]
