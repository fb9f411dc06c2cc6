"""Which wrong formulas would nobody notice? Change one symbol of an exported cell at a time, and see.

    python tools/mutants.py 01_gaussian 02_forward       # or `make mutants ARGS="01_gaussian 02_forward"`

Every changed chapter is run as a program, up to the first cell that prints something else. Where none does, the change
goes into a copy of the library, and tests run there. What is left is printed: each line is either no change at all (`<`
for `<=` where nothing is equal), or a check that is missing. Not a test itself: it takes minutes, and an hour for a
chapter that trains.
"""

import ast
import contextlib
import io
import linecache
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).parents[1]
QUICK = ["00_checks", "01_gaussian", "02_forward", "03_posterior", "04_reverse", "05_bound", "06_objective"]
GENERAL = ("properties", "diffusers_scheduler")
OPERATORS = {
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*")},
    **{ast.Pow: ("**", "*"), ast.Mod: ("%", "*"), ast.And: ("and", "or"), ast.Or: ("or", "and")},
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
    **{ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")},
}
NAMES = dict(
    **dict(sqrt="square", square="sqrt", log="log1p", log1p="log", exp="expm1", expm1="exp", cumprod="cumsum"),
    **dict(min="max", max="min", mean="sum", sum="mean", abs="neg", beta="alpha", alpha="beta"),
    **dict(alpha_bar="alpha_bar_prev", alpha_bar_prev="alpha_bar"),
)


class Change(NamedTuple):
    "One symbol of a cell: its place, and the replacement."

    cell: int
    start: int
    end: int
    new: str

    def of(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]

    def shown(self, source: str) -> str:
        "Return the line with the change marked in it."
        before, after = source[: self.start].rsplit("\n", 1)[-1].lstrip(), source[self.end :].split("\n", 1)[0]
        return f"{before}[{source[self.start : self.end]} → {self.new}]{after}"


def symbols(tree: ast.AST, source: str):
    "Yield every symbol that can be changed, as (start, end, what stands there instead)."
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line.encode()))

    def place(line: int, column: int) -> int:
        return len(source.encode()[: lines[line - 1] + column].decode())

    def ends(node: ast.AST) -> tuple[int, int]:
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    for node in ast.walk(tree):
        match node:
            case (
                ast.BinOp(left=a, right=b, op=op)
                | ast.BoolOp(values=[a, b, *_], op=op)
                | ast.Compare(left=a, comparators=[b, *_], ops=[op, *_])
            ):
                old, new = OPERATORS.get(type(op), ("@", "@"))
                start = source.find(old, ends(a)[1], ends(b)[0])
                if old != new and start >= 0:
                    yield start, start + len(old), new
            case ast.UnaryOp(op=ast.USub()):
                yield ends(node)[0], ends(node)[0] + 1, "+"
            case ast.UnaryOp(op=ast.Not()):
                yield ends(node)[0], ends(node)[0] + 3, ""
            case ast.Constant(value=bool(value)):
                yield *ends(node), str(not value)
            case ast.Constant(value=int(value)):
                yield *ends(node), str(value + 1)
            case ast.Constant(value=float(value)):
                yield *ends(node), repr(1.5 * value or 0.1)
            case ast.Attribute(attr=name) if name in NAMES:
                yield ends(node)[1] - len(name), ends(node)[1], NAMES[name]


def without_words(tree: ast.AST) -> ast.AST:
    "Return the tree without annotations, imports, f-strings and what is raised: there is no formula in them."

    class Formulas(ast.NodeTransformer):
        def visit(self, node):
            for field in {"annotation", "returns"} & set(node._fields):
                setattr(node, field, None)
            return None if isinstance(node, ast.Raise | ast.ImportFrom | ast.JoinedStr) else self.generic_visit(node)

    return Formulas().visit(tree)


def changes(cells: list[str]) -> list[Change]:
    "Return all changes of the exported cells that still are programs."
    valid = []
    for i, source in enumerate(cells):
        if re.search(r"^#\|\s*exporti?\b", source, re.M):
            for start, end, new in sorted(set(symbols(without_words(ast.parse(source)), source))):
                change = Change(i, start, end, new)
                with contextlib.suppress(SyntaxError):
                    compile(change.of(source), "cell", "exec")
                    valid.append(change)
    return valid


class Noticed(Exception):
    "A cell prints something else than it always does."


def run_cell(source: str, k: int, namespace: dict) -> str:
    "Run cell `k` and return what it prints."
    name = f"<cell {k}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name  # torch.jit looks there
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        exec(compile(source, name, "exec"), namespace)
    return out.getvalue()


def run(
    cells: list[str], expected: list[str] | None = None, first: int = 0, namespace: dict | None = None
) -> list[str]:
    "Run the cells from `first` on and return what each prints; raise `Noticed` as soon as that is not as `expected`."
    namespace, printed = {"__name__": "__main__"} if namespace is None else namespace, []
    for k, source in enumerate(cells[first:], first):
        printed.append(run_cell(source, k, namespace))
        if expected is not None and printed[-1] != expected[k]:
            raise Noticed(k)
    return printed


def holds(work: Callable[[], object], seconds: int) -> bool:
    "Return whether `work()` ends without an error, within `seconds`, in a copy of this process."
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def unnoticed(cells: list[str], todo: list[Change]) -> list[int]:
    """Return the numbers of the changes in `todo` with which a chapter still prints what it always prints.

    The cells run once, in their order; before each, a copy of the process runs the rest of the chapter for each change
    of that cell, up to the first cell that notices. Files that the chapter has written are the same for every copy.
    """
    left, namespace = [], {"__name__": "__main__"}
    os.chdir(ROOT / "nbs")
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as copy:
        tempfile.tempdir, began = scratch, time.monotonic()
        expected = run(cells)
        seconds = 10 + int(4 * (time.monotonic() - began))
        assert holds(lambda: run(cells, expected), seconds), "the chapter does not print the same twice"
        for k in range(len(cells)):
            mine = [i for i, change in enumerate(todo) if change.cell == k]
            if mine:
                shutil.copytree(scratch, copy, dirs_exist_ok=True)
            for i in mine:
                changed = [*cells[:k], todo[i].of(cells[k]), *cells[k + 1 :]]
                if holds(lambda new=changed, k=k: run(new, expected, k, namespace), seconds):
                    left.append(i)
                shutil.rmtree(scratch)
                shutil.copytree(copy, scratch)
            run_cell(cells[k], k, namespace)
        tempfile.tempdir = None
    return left


def seen_by_tests(chapter: str, cells: list[str]) -> bool:
    "Return whether a test of the chapter's module, `tests/test_<module>.py`, fails, or one of the `GENERAL` tests."
    (module,) = re.findall(r"#\|\s*default_exp\s+(\w+)", "\n".join(cells))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("nbs", "ddpm_lit", "tests"):
            shutil.copytree(ROOT / name, copy / name)
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        path = copy / "nbs" / f"{chapter}.ipynb"
        nb = nbformat.read(path, 4)
        for cell, source in zip((c for c in nb.cells if c.cell_type == "code"), cells, strict=True):
            cell.source = source
        nbformat.write(nb, path)
        subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=copy, check=True, capture_output=True)
        tests = [p for p in (copy / "tests" / f"test_{name}.py" for name in (module, *GENERAL)) if p.exists()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=copy, capture_output=True).returncode != 0


def main(*chapters: str) -> None:
    "Print, for each chapter, the changes that nobody noticed; then a table."
    os.environ |= dict(OMP_NUM_THREADS="1", MPLBACKEND="agg")  # before torch is imported; one process to a core
    import sympy  # noqa: F401 (once, not again in every process)
    import torch  # noqa: F401

    table = []
    for chapter in chapters or QUICK:
        nb = nbformat.read(ROOT / "nbs" / f"{chapter}.ipynb", 4)
        cells = [cell.source for cell in nb.cells if cell.cell_type == "code"]
        todo = changes(cells)
        with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
            passed = pool.apply(unnoticed, [cells, todo])
            assert not passed or not pool.apply(seen_by_tests, [chapter, cells]), f"{chapter}: its tests fail as it is"
            changed = {i: [c if k != todo[i].cell else todo[i].of(c) for k, c in enumerate(cells)] for i in passed}
            jobs = {i: pool.apply_async(seen_by_tests, [chapter, changed[i]]) for i in passed}
            left = [i for i, job in jobs.items() if not job.get()]
        for i in left:
            print(f"{chapter}: {todo[i].shown(cells[todo[i].cell])}", flush=True)
        table.append((chapter, len(todo), len(todo) - len(passed), len(passed) - len(left), len(left)))
    for row in [("chapter", "changes", "seen by it", "by tests", "by none"), *table]:
        print("{:<16}{:>10}{:>12}{:>10}{:>10}".format(*row))


if __name__ == "__main__":
    main(*sys.argv[1:])
