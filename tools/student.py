"""Write the chapters with their exercises open: `python tools/student.py [folder]`, by default student/.

In the copy the answer of every exercise is `...`; the check that asserts it stays, so a reader works until it passes.
The answer of a check is the value that it compares with: an expression or, where it is a name, what the cell assigns to
it. Where the value is a plain number, the answer is the first thing computed on the way to it.
"""

import ast
import shutil
import sys
from pathlib import Path

import nbformat
from chapters import ROOT, Chapter, read_book

HINT = "# Your turn: replace every ... until this cell passes.\n"
VALUE = {"identity": (1, 2), "expectation": (1, 2), "symbolic": (1, 1)}  # where a check has its two sides


def exercises(chapter: Chapter) -> list[int]:
    "Return the indices of the code cells that assert the exercises."
    cells, inside = [], False
    for i, cell in enumerate(chapter.cells):
        headings = [line for line in cell.source.split("\n") if line.startswith("## ")]
        if cell.cell_type == "markdown" and headings:
            inside = headings[-1].startswith("## Exercises")
        elif inside and cell.cell_type == "code":
            cells.append(i)
    return cells


def names(node: ast.AST) -> set[str]:
    "Return the names that an expression reads."
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def assignments(tree: ast.Module) -> list[tuple[set[str], ast.Assign]]:
    "Return the top-level assignments of a cell, with the names that each sets."
    return [(set().union(*map(names, node.targets)), node) for node in tree.body if isinstance(node, ast.Assign)]


def sides(tree: ast.Module) -> list[tuple[int, ast.expr, ast.expr]]:
    "Return line, left and right side of every accepting check of a cell; of its assertions where it has no check."
    compared, asserted = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in VALUE:
            left, right = VALUE[node.func.id]
            if len(node.args) <= right:  # the sides stand in a starred tuple
                left = right = len(node.args) - 1
            compared.append((node.lineno, node.args[left], node.args[right]))
        elif isinstance(node, ast.Assert):
            tests = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
            for test in (test for test in tests if isinstance(test, ast.Compare)):
                if not isinstance(test.ops[0], ast.NotEq | ast.Is | ast.IsNot):  # those `...` would pass
                    asserted.append((node.lineno, test, ast.Constant(0)))
    return compared or asserted


def answer(tree: ast.Module, line: int, left: ast.expr, right: ast.expr) -> ast.expr:
    "Return the expression that is the answer to one check."
    before = [(targets, node) for targets, node in assignments(tree) if node.lineno < line]
    constant = not names(right) and not any(isinstance(n, ast.BinOp) for n in ast.walk(right))
    if left is not right and not constant and not isinstance(right, ast.Name | ast.Attribute | ast.Subscript):
        return right
    wanted, chain = names(left if constant else right), []
    for targets, node in reversed(before):
        if targets & wanted:
            chain.append(node.value)
            wanted |= names(node.value) if constant else set()
    if chain:
        return chain[-1] if constant else chain[0]
    return left.left if isinstance(left, ast.Compare) else left if constant else right


def opened(source: str) -> str:
    "Return the source of an exercise's cell with `...` for every answer."
    tree, lines = ast.parse(source), source.encode().split(b"\n")
    spans = set()
    for line, left, right in sides(tree):
        node = answer(tree, line, left, right)
        spans.add((node.lineno, node.col_offset, node.end_lineno, node.end_col_offset))
    outer = [s for s in spans if not any(o[:2] <= s[:2] and s[2:] <= o[2:] and o != s for o in spans)]
    for first, start, last, end in sorted(outer, reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + b"..." + lines[last - 1][end:]]
    return HINT + b"\n".join(lines).decode()


def write(folder: Path) -> int:
    "Write the copies, and the data that lies beside the chapters; return the number of opened cells."
    folder.mkdir(parents=True, exist_ok=True)
    n = 0
    for chapter in read_book():
        notebook = nbformat.read(chapter.path, 4)
        for i in exercises(chapter):
            notebook.cells[i].source, notebook.cells[i].outputs = opened(notebook.cells[i].source), []
            n += 1
        nbformat.write(notebook, folder / chapter.path.name, version=4)
    for path in [*(ROOT / "nbs").glob("*.jsonl"), *(ROOT / "nbs").glob("*.json")]:
        shutil.copy(path, folder)
    return n


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "student")
    print(f"{write(folder)} cells with exercises to solve, in {folder}/")
