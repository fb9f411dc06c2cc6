"""The notebooks are whole, and the library is what they export.

`pytest --nbval nbs/` compares stored outputs with a fresh run. What it cannot see is tested here: that all cells were
run, from top to bottom, without an error or a warning; that the files are small and carry nothing of the machine they
were run on; that `ddpm_lit/` has not been edited by hand.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
BY_HAND = {"__init__.py", "__main__.py", "_renamed.py"}
IGNORED = re.compile(r"^\s*#\s*(NBVAL_IGNORE_OUTPUT|NBVAL_SKIP|PYTEST_VALIDATE_IGNORE_OUTPUT)", re.M)
IGNORED_TAGS = {"nbval-ignore-output", "nbval-skip"}
MACHINE = re.compile(r"/(home|root|tmp|work|Users)/\w")


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def said(cell) -> str:
    "All text that a code cell shows."
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(texts)


def faults(path: Path) -> list[str]:
    "Every rule of the book that the notebook breaks."
    nb = nbformat.read(path, 4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    exported = [cell.source for cell in code if re.search(r"^#\|\s*exporti?\b", cell.source, re.M)]
    ignored = [cell for cell in code if IGNORED.search(cell.source) or tags(cell) & IGNORED_TAGS]
    number = int(path.name[:2])
    found = []

    def rule(holds, fault: str) -> None:
        if not holds:
            found.append(fault)

    rule(path.stat().st_size <= 1.5e6, f"has {path.stat().st_size:,} bytes, more than 1.5 MB")
    rule([c.execution_count for c in code] == [*range(1, len(code) + 1)], "has cells not run, or not from the top")
    for cell in code:
        head = cell.source.strip().split("\n")[0]
        for output in cell.outputs:
            wanted = "raises-exception" in tags(cell)
            rule(output.output_type != "error" or wanted, f"ends in an error: {head}")
            rule(output.get("name") != "stderr", f"writes to stderr: {head}")
        names = [output.get("name") for output in cell.outputs]
        torn = any(name and name == after for name, after in zip(names, names[1:], strict=False))
        rule(not torn, f"stores one stream in pieces, which differ from run to run: {head}")
        rule(not MACHINE.search(said(cell)), f"shows a path of the machine it ran on: {head}")
        rule(not re.search(r"\bnbdev_export\(", cell.source), f"exports itself: {head}")
        rule(set(cell.metadata) <= {"tags", "lines_to_next_cell"}, f"has metadata {', '.join(cell.metadata)}: {head}")
    for source in exported:
        lines = source.split("\n")
        rule(len(lines) <= 40, f"exports {len(lines)} lines in one cell, more than 40: {lines[1]}")
    for cell in code:
        lines = cell.source.split("\n")
        fine = len(lines) <= 25 or cell.source in exported or re.search(r"^# long: \w", cell.source, re.M)
        rule(fine, f"has {len(lines)} lines in one cell, more than 25: {lines[0]}")
        rule(
            not re.search(r"\b(identity|expectation|symbolic|rejects|raises)\(\s*\"\"", cell.source),
            "has a nameless check",
        )
    row = longest_row_of_exports(nb.cells)
    rule(row <= 2, f"exports {row} cells in a row, without prose or a check")
    far = exports_far_from_a_check(nb.cells)
    rule(len(far) <= len(exported) / 10, f"has {len(far)} of {len(exported)} exports without a check nearby: {far}")
    rule(set(nb.metadata) == {"kernelspec"}, f"has metadata {', '.join(sorted(nb.metadata))}")
    rule(nb.metadata.get("kernelspec", {}).get("name") == "python3", "does not ask for the kernel python3")
    rule(len(ignored) <= len(code) / 10, f"hides {len(ignored)} of {len(code)} cells from nbval, more than a tenth")
    names = re.findall(r"^#\|\s*default_exp\s+(\w+)\s*$", "\n".join(c.source for c in code), re.M)
    rule(len(names) == 1 or number >= 20, f"must name one module in `#| default_exp`, names {len(names)}")
    checks = [cell for cell in code if re.search(r"^\s*rejects\(", cell.source, re.M)]
    rule(checks or not exported or number > 7, "exports formulas and refuses no wrong one by `rejects`")
    title = nb.cells[0].source.split("\n") if nb.cells[0].cell_type == "markdown" else [""]
    rule(title[0].startswith("# "), "does not begin with its title")
    rule(any(line.startswith("> ") for line in title), "promises nothing: the title has no `> ` line")
    maps = [c.source for c in nb.cells if c.cell_type == "markdown" and c.source.startswith("**Map.** ")]
    rule(len(maps) == 1, f"must have one cell that starts with **Map.**, has {len(maps)}")
    rule(all(len(text.split()) <= 90 for text in maps), "has a map of more than 90 words")
    return found


def is_export(cell) -> bool:
    "Whether a cell exports a definition (one that only imports does not count)."
    if cell.cell_type != "code" or not re.search(r"^#\|\s*exporti?\b", cell.source, re.M):
        return False
    return any(not isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cell.source).body)


def longest_row_of_exports(cells) -> int:
    longest = row = 0
    for cell in cells:
        row = row + 1 if is_export(cell) else 0
        longest = max(longest, row)
    return longest


def exports_far_from_a_check(cells) -> list[str]:
    "The first lines of exported cells after which no check comes within two code cells."
    code, far = [cell for cell in cells if cell.cell_type == "code"], []
    for i, cell in enumerate(code):
        after = "\n".join(c.source for c in code[i + 1 : i + 3] if not is_export(c))
        if is_export(cell) and not re.search(
            r"^\s*(identity|expectation|symbolic|rejects|raises)\(|^\s*assert\b", after, re.M
        ):
            far.append(cell.source.split("\n")[1])
    return far


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_keeps_the_rules(path):
    assert faults(path) == []


def test_there_are_chapters_and_their_numbers_differ():
    assert len(CHAPTERS) >= 11
    assert len({path.stem.split("_")[0] for path in CHAPTERS}) == len(CHAPTERS)
    assert all(re.fullmatch(r"\d\d[bc]?_[a-z0-9_]+", path.stem) for path in CHAPTERS)


# The rules themselves: each of them refuses the notebook that breaks it, and only that.


def sample() -> nbformat.NotebookNode:
    "A chapter that keeps all rules."
    sources = ["#| default_exp toy", "#| export\ndef f():\n    return 1", 'rejects("g", g)', "print(1)"]
    code = [nbformat.v4.new_code_cell(source, execution_count=i + 1) for i, source in enumerate(sources)]
    code[3].outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
    head = [
        nbformat.v4.new_markdown_cell(text)
        for text in ("# Toy\n\n> At the end you hold 1.", "**Map.** Nothing is assumed.")
    ]
    cells = [*head, *code]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python"}})


def error():
    return nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])


def stream(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


BREAKS = {
    "more than 1.5 MB": lambda nb: nb.cells[5].outputs.append(stream("x" * 1_500_000)),
    "not run": lambda nb: nb.cells[5].update(execution_count=None),
    "not from the top": lambda nb: nb.cells[5].update(execution_count=3),
    "ends in an error": lambda nb: nb.cells[5].outputs.append(error()),
    "writes to stderr": lambda nb: nb.cells[5].outputs[0].update(name="stderr"),
    "in pieces": lambda nb: nb.cells[5].outputs.append(stream("2\n")),
    "path of the machine": lambda nb: nb.cells[5].outputs.append(stream("saved in /home/someone/x")),
    "exports itself": lambda nb: nb.cells[5].update(source="import nbdev; nbdev.nbdev_export()"),
    "has metadata execution": lambda nb: nb.cells[5].metadata.update(execution={"iopub": "2026"}),
    "more than 40": lambda nb: nb.cells[3].update(source="#| export\n" + "\n".join(["x = 1"] * 40)),
    "more than 25": lambda nb: nb.cells[5].update(source="\n".join(["x = 1"] * 26)),
    "a nameless check": lambda nb: nb.cells[5].update(source='identity("", 1, 1)'),
    "exports 3 cells in a row": lambda nb: nb.cells.__setitem__(slice(3, 4), [nb.cells[3]] * 3),
    "1 of 1 exports without a check nearby": lambda nb: nb.cells[4].update(source="print(2)"),
    "starts with **Map.**": lambda nb: nb.cells[1].update(source="Map"),
    "more than 90 words": lambda nb: nb.cells[1].update(source="**Map.** " + "word " * 90),
    "has metadata kernelspec, widgets": lambda nb: nb.metadata.update(widgets={}),
    "kernel python3": lambda nb: nb.metadata.kernelspec.update(name="mine"),
    "more than a tenth": lambda nb: nb.cells[5].update(source="# NBVAL_IGNORE_OUTPUT\nprint(1)"),
    "1 of 4 cells from nbval": lambda nb: nb.cells[5].metadata.update(tags=["nbval-skip"]),
    "names 0": lambda nb: nb.cells[2].update(source="x = 1"),
    "names 2": lambda nb: nb.cells[5].update(source="#| default_exp other"),
    "by `rejects`": lambda nb: nb.cells[4].update(source='identity("g", 1, 1)'),
    "title": lambda nb: nb.cells.pop(0),
    "promises nothing": lambda nb: nb.cells[0].update(source="# Toy"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_chapter_is_refused(fault, tmp_path):
    path = tmp_path / "01_toy.ipynb"
    nb = sample()
    nbformat.write(nb, path)
    assert faults(path) == []
    BREAKS[fault](nb)
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert any(fault in text for text in faults(path)), faults(path)


def test_an_error_on_purpose_is_allowed_where_it_is_marked(tmp_path):
    path, nb = tmp_path / "01_toy.ipynb", sample()
    nb.cells[5].outputs = [error()]
    nb.cells[5].metadata.tags = ["raises-exception"]
    nbformat.write(nb, path)
    assert faults(path) == []


# The library is what the notebooks export.


def export(folder: Path) -> Path:
    "Export the chapters into a copy of the project that holds nothing generated; returns the copy's library."
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "ddpm_lit").mkdir()
    for name in BY_HAND:
        shutil.copy(ROOT / "ddpm_lit" / name, folder / "ddpm_lit")
    subprocess.run([sys.executable, "-c", "import nbdev; nbdev.nbdev_export()"], cwd=folder, check=True)
    return folder / "ddpm_lit"


def differences(library: Path, fresh: Path) -> list[str]:
    "The files that are not byte for byte the same in both folders, or are in one only."
    ours, theirs = ({p.name: p.read_bytes() for p in folder.glob("*.py")} for folder in (library, fresh))
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def test_the_library_is_what_the_notebooks_export(tmp_path):
    fresh = export(tmp_path)
    assert len(list(fresh.glob("*.py"))) > len(BY_HAND) + 2
    assert differences(ROOT / "ddpm_lit", fresh) == []
    assert {p.suffix for p in (ROOT / "ddpm_lit").iterdir() if p.name != "__pycache__"} == {".py"}

    # The comparison sees an edit by hand, a module that no notebook exports, and one that is missing.
    edited = tmp_path / "edited"
    shutil.copytree(fresh, edited)
    with open(edited / "forward.py", "a", encoding="utf-8") as file:
        file.write("\n")
    (edited / "stale.py").write_text("x = 1\n", encoding="utf-8")
    (edited / "checks.py").unlink()
    assert differences(edited, fresh) == ["checks.py", "forward.py", "stale.py"]


# What the long commands computed is whole, and the chapter that shows it is the program that computes it.
TABLES = {"ablation": ("21_ablation", 60), "improved": ("30_improved", 63), "solvers": ("31_solvers", 90)}


def run_as_program(chapter: str, folder: Path) -> subprocess.CompletedProcess:
    "Run a chapter in `folder` as `make` runs it to fill its table."
    nb = nbformat.read(ROOT / "nbs" / f"{chapter}.ipynb", 4)
    program = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    (folder / "program.py").write_text(program, encoding="utf-8")
    environment = os.environ | {"TABLE": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    kwargs = dict(cwd=folder, env=environment, capture_output=True, text=True)
    return subprocess.run([sys.executable, "program.py"], **kwargs)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("command", TABLES)
def test_the_table_of_a_chapter_is_whole(command, tmp_path):
    chapter, n = TABLES[command]
    table = tmp_path / f"{chapter}.jsonl"
    shutil.copy(ROOT / "nbs" / table.name, tmp_path)
    first, *rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert first["command"] == f"make {command}" and f"\n{command}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    keys = {tuple(value for value in row.values() if not isinstance(value, float)) for row in rows}
    assert len(keys) == len(rows) == n
    if command != "ablation":  # one of the programs stands for the others
        return
    run = run_as_program(chapter, tmp_path)
    assert run.returncode == 0 and run.stdout == "", run.stderr  # nothing is missing, so nothing is trained
    first["steps"] += 1
    table.write_text("\n".join(map(json.dumps, [first, *rows])) + "\n", encoding="utf-8")
    assert "remove it, and run `make ablation`" in run_as_program(chapter, tmp_path).stderr
