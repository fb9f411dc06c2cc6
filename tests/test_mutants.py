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


AT_ONE, AT_ENDS = "print(round(area(1), 3))", "print([round(area(x), 3) for x in (0, 2)], area())"


@pytest.mark.parametrize("check, left", [(AT_ONE, {0, 2, 3, 4, 6}), (AT_ENDS, set())])
def test_what_is_left_is_what_no_cell_checks(check, left, monkeypatch):
    monkeypatch.chdir(mutants.ROOT)  # back there when this ends
    cells = [*CHAPTER[:2], check]
    assert set(mutants.unnoticed(cells, mutants.changes(cells))) == left


def test_each_change_finds_the_files_that_the_chapter_wrote_before(monkeypatch):
    monkeypatch.chdir(mutants.ROOT)
    write = "import tempfile, pathlib\nfile = pathlib.Path(tempfile.mkdtemp()) / 'x'\nfile.write_text('')"
    grow = "#| export\nfile.write_text(file.read_text() + 'x' * 1)"
    cells = [write, grow, "print(len(file.read_text()))"]
    assert mutants.unnoticed(cells, mutants.changes(cells)) == []
    assert mutants.unnoticed([*cells[:2], "print(len(file.read_text()) > 0)"], mutants.changes(cells)) == [2]


def test_a_chapter_that_never_ends_is_stopped():
    assert not mutants.holds(lambda: mutants.run(["while True:\n    pass"]), seconds=1)
    assert mutants.holds(lambda: mutants.run(["x = 1"]), seconds=9)
