"""What is written of the results is what their JSON says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import results_page
import short_table

ROOT = Path(results_page.__file__).parent.parent


def test_the_page_and_the_readme_are_of_the_results_that_are_there() -> None:
    told = "run python scripts/results_page.py"
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == results_page.page(), told
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert short_table.in_readme(readme) == readme, told


def test_each_comparison_is_a_link_to_its_heading() -> None:
    page = results_page.page()
    headings = [results_page.anchor(line[3:]) for line in page.splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings)
    links = re.findall(r"\]\(#(.+)\) \|", page)
    comparisons = [path for path in ROOT.glob("results/*/table.md") if path.with_name("report.html").is_file()]
    assert len(links) == len(comparisons)
    assert set(links) <= set(headings)


def test_an_anchor_is_githubs() -> None:
    assert results_page.anchor("Plain, of 32 px, 10 % (a-b)") == "plain-of-32-px-10--a-b"


def test_only_what_stands_between_the_marks_is_written_anew() -> None:
    begin, end = short_table.MARKS
    written = short_table.in_readme(f"before\n{begin}\nstale\n{end}\nafter\n")
    assert written.startswith(f"before\n{begin}\n")
    assert written.endswith(f"{end}\nafter\n")
    assert "stale" not in written
    for torn in (f"before\n{begin}\nafter\n", f"{end}\n{begin}\nafter\n", "before\n"):
        with pytest.raises(ValueError, match="values to unpack"):
            short_table.in_readme(torn)


def test_the_table_in_short_names_the_networks_that_scored_it() -> None:
    assert "efficientnet-lite0" in "".join(short_table.in_short())
