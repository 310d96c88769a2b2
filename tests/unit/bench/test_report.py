"""The table, the documents and the chart made of results."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from bench import chart, report
from bench.figures import LIMIT, Measure
from bench.report import CellResult

RATE = Measure("requests", "/s", aims={"qsd": 2.0, "nbdkit": 1.0}, cpu="cpu")
WAIT = Measure("wait", "ms", "lower", {LIMIT: 10.0})


def result(name: str = "randread/raw/disk") -> CellResult:
    samples: dict[str, list[dict[str, float] | None]] = {
        "fleecer": [{"requests": 150_000.0, "cpu": 5.0, "wait": 7.5}, {"requests": 160_000.0, "cpu": 5.0, "wait": 8}],
        "qsd 7.2.22": [{"requests": 50_000.0, "cpu": 20.0}, {"requests": 40_000.0, "cpu": 20.0}],
        "nbdkit 1.32.5": [{"requests": 140_000.0, "cpu": 4.0}, None],
    }
    return CellResult(name, (RATE, WAIT), samples, ["nbdkit 1.32.5, round 2: it ended"], "requests")


def test_the_table_has_a_line_for_each_comparison() -> None:
    lines = report.markdown(result().rows()).splitlines()
    assert len(lines) == 2 + 3
    assert "| requests | 155 k /s | qsd 7.2.22 | 45 k | 3.50x | 3.00..4.00 | 4.00x | >= 2x | met |" in lines[2]
    assert "< 10 ms | met |" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_the_plain_table_is_aligned() -> None:
    lines = report.plain(result().rows()).splitlines()
    assert (
        len({line.index(word) for line, word in zip(lines, ("measure", *["requests"] * 2, "wait"), strict=True)}) == 1
    )


def test_the_headline_of_a_cell_is_its_row_with_an_aim() -> None:
    without = result("other")
    without.headline = None
    assert [(row.cell, row.against) for row in report.headlines([result(), without])] == [("randread/raw/disk", "qsd")]


def test_the_document_holds_every_sample_and_every_failure() -> None:
    read = json.loads(json.dumps(report.document([result()], {"date": "2030-01-01"})))
    cell = read["cells"][0]
    assert cell["samples"]["nbdkit 1.32.5"] == [{"requests": 140_000.0, "cpu": 4.0}, None]
    assert cell["failures"] == ["nbdkit 1.32.5, round 2: it ended"]
    assert cell["rows"][0]["ratio"] == {"median": 3.5, "low": 3.0, "high": 4.0, "rounds": 2}


def test_a_part_is_put_between_the_marks_and_again_in_its_own_place() -> None:
    text = f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n"
    once = report.with_part(text, "new")
    assert once == f"head\n{report.BEGIN}\nnew\n{report.END}\ntail\n"
    assert report.with_part(once, "new") == once
    with pytest.raises(ValueError, match="lacks"):
        report.with_part("no marks", "new")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (99.94, "99.9"), (123.4, "123"), (9999, "9999"), (54_321, "54 k"), (2.5e6, "2.5 M")],
)
def test_numbers_have_the_digits_that_count(value: float, text: str) -> None:
    assert report.number(value) == text


def test_the_chart_is_sound_xml_with_a_bar_per_ratio_against_qemu() -> None:
    root = ElementTree.fromstring(chart.svg(result("a<b & c").rows(), "T < U"))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a<b & c requests" in words
    assert "3.50x" in words
    assert "T < U" in words
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 1


def test_the_chart_stays_small_however_many_rows_there_are() -> None:
    rows = [row for index in range(400) for row in result(f"{'long-name' * 9}{index}").rows()]
    drawn = chart.svg(rows, "title")
    assert len(drawn.encode()) < chart.BYTES_MAX
    assert "250 more ratios are in the table." in drawn


def test_the_scale_of_the_chart_is_logarithmic_and_has_ends() -> None:
    one, two, four = (chart.position(ratio) for ratio in (1, 2, 4))
    assert two - one == pytest.approx(four - two)
    assert chart.position(1000) == chart.position(16)
    assert chart.position(0.0001) == chart.position(0.25)
