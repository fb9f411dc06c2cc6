"""The tool behind `make mutants`: what it changes, and what it takes for noticed."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "tools" / "mutants.py"
spec = importlib.util.spec_from_file_location("mutants", PATH)
spec.loader.exec_module(mutants := importlib.util.module_from_spec(spec))

CHAPTER = [
    "#| default_exp toy",
    """#| export
import math

def area(r: float = 1.0) -> float:
    "The area of a circle of radius r, not of 2 r."
    if not 0 <= r:
        raise ValueError(f"r must be at least 0, got {r + 1}")
    return math.pi * r**2""",
    "print(round(area(1), 3))",
]


def shown(cells):
    return [change.shown(cells[change.cell]) for change in mutants.changes(cells)]


def test_every_symbol_of_a_formula_is_changed_and_no_words():
    assert shown(CHAPTER) == [
        "def area(r: float = [1.0 → 1.5]) -> float:",
        "if [not → ] 0 <= r:",
        "if not [0 → 1] <= r:",
        "if not 0 [<= → <] r:",
        "return math.pi [* → /] r**2",
        "return math.pi * r[** → *]2",
        "return math.pi * r**[2 → 3]",
    ]


def noticed(cells):
    expected, _ = mutants.run(cells)
    return [
        mutants.run([*cells[: c.cell], c.of(cells[c.cell]), *cells[c.cell + 1 :]])[0] != expected
        for c in mutants.changes(cells)
    ]


AT_ONE, AT_ENDS = "print(round(area(1), 3))", "print([round(area(x), 3) for x in (0, 2)], area())"


@pytest.mark.parametrize("check, left", [(AT_ONE, {0, 2, 3, 4, 6}), (AT_ENDS, set())])
def test_what_is_left_is_what_no_cell_checks(check, left, monkeypatch):
    monkeypatch.chdir(mutants.ROOT)  # back there when this ends
    seen = noticed([*CHAPTER[:2], check])
    assert {i for i, was in enumerate(seen) if not was} == left


def test_a_chapter_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.chdir(mutants.ROOT)
    assert mutants.run(["while True:\n    pass"], seconds=1)[0] is None
