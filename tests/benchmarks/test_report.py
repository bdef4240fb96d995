"""What is committed about the rows is what the rows say."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import report, rows, tables
from tests.benchmarks.test_bars import SHAPE, point

ROOT = Path(__file__).parents[2]


def test_the_report_is_of_the_committed_rows():
    assert (rows.RESULTS / "report.md").read_text() == report.render()


def test_times_in_the_readme_are_those_of_the_report():
    readme = (ROOT / "README.md").read_text()
    text = readme[readme.index("## Speed") : readme.index("## What it costs")]
    quoted = re.findall(r"^\| .*", text, re.MULTILINE)
    assert len(quoted) > 20
    assert set(quoted) <= set((rows.RESULTS / "report.md").read_text().splitlines())


def test_the_newest_time_of_each_implementation_is_listed():
    known = [point(us=99.0), point(us=17.04), point(us=23.0, impl="humming")]
    known += [point(us=19.96, act="int8g32"), point(m=3), point(m=4, bf16_us=123.4)]
    name = f"{SHAPE.n} x {SHAPE.k}, 128"
    lines = tables.linear_times(known).splitlines()
    assert lines[2] == f"| {name} | 1 | 16.0 | 60.0 | 17.0 | 20.0 |  |  |  |  |  | 23.0 |  |"
    assert lines[3] == f"| {name} | 4 | 16.0 | 123 | 20.0 |  |  |  |  |  |  |  |  |"
    assert len(lines) == 4
