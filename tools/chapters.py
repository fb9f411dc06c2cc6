"""What the chapters hold, read from the stored notebooks: titles, parts, exported names, checks, questions, figures.

Nothing is executed. The web book, its indexes, the copy for students and their tests read the chapters through this.
"""

import ast
import re
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
# The parts, by the number that a chapter's name begins with. Plumbing chapters go to a part of their own.
PARTS = {"The mathematics": 0, "The machine": 8, "Experiments": 20, "Systems": 30, "The surface": 39}
PLUMBING = "Plumbing, which may be skipped"
CHECK = re.compile(r"^(symbolic|identity|expectation|rejects|raises) +✓ (.+)$", re.M)
SKIPPED = re.compile(
    r"\breader(s)? of the book may skip (this chapter|it)\b|\bmay skip this chapter\b|\bplumbing\b", re.I
)


def settings() -> dict[str, str]:
    "Return settings.ini, the one place with the repository's address."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


@dataclass(frozen=True)
class Check:
    "One executed check: its kind, its name, and the index of the cell that printed it."

    kind: str
    name: str
    cell: int


@dataclass(frozen=True)
class Chapter:
    "A stored notebook."

    path: Path

    @property
    def stem(self) -> str:
        "The chapter's file name, without its suffix."
        return self.path.stem

    @property
    def number(self) -> str:
        "The number in front of its name, with its letter."
        return self.stem.split("_")[0]

    @cached_property
    def cells(self) -> list:
        "All cells of the notebook."
        return nbformat.read(self.path, 4).cells

    @cached_property
    def code(self) -> dict[int, str]:
        "The sources of the code cells, by their index among all cells."
        return {i: cell.source for i, cell in enumerate(self.cells) if cell.cell_type == "code"}

    @cached_property
    def prose(self) -> dict[int, str]:
        "The sources of the Markdown cells, by their index."
        return {i: cell.source for i, cell in enumerate(self.cells) if cell.cell_type == "markdown"}

    @property
    def title(self) -> str:
        "The text of the first heading."
        return self.cells[0].source.split("\n")[0].removeprefix("# ").strip()

    @property
    def promise(self) -> str:
        "The sentence under the title."
        return next(line[2:] for line in self.cells[0].source.split("\n") if line.startswith("> "))

    @property
    def plumbing(self) -> bool:
        "Whether the chapter says at its beginning that a reader of the book may skip it."
        head = [text for i, text in self.prose.items() if i == 0 or text.startswith("**Map.**")]
        return any(SKIPPED.search(text) for text in head)

    @property
    def part(self) -> str:
        "The part of the book that it belongs to."
        if self.plumbing:
            return PLUMBING
        return [name for name, first in PARTS.items() if int(self.number[:2]) >= first][-1]

    @cached_property
    def module(self) -> str | None:
        "The module that it exports, or None."
        names = re.findall(r"^#\|\s*default_exp\s+(\w+)", "\n".join(self.code.values()), re.M)
        return names[0] if names else None

    @cached_property
    def exports(self) -> dict[str, int]:
        "The top-level functions, classes and constants of the exported cells, and the index of the cell of each."
        names = {}
        for i, source in self.code.items():
            if re.match(r"#\|\s*exporti?\b", source):
                names |= dict.fromkeys(defined(source), i)
        return names

    @cached_property
    def checks(self) -> list[Check]:
        "The checks that ran, in their order, as the stored outputs name them."
        return [
            Check(kind, name.strip(), i)
            for i in self.code
            for output in self.cells[i].outputs
            for kind, name in CHECK.findall(output.get("text", ""))
        ]

    @cached_property
    def questions(self) -> list[str]:
        "The questions of the section *Questions readers ask*, in Markdown."
        return re.findall(r"^\*\*(.+?\?)\*\*", self.section("Questions readers ask"), re.M)

    @cached_property
    def figures(self) -> list[tuple[int, str]]:
        "The cells that show a picture, each with the heading it stands under."
        return [(i, self.heading(i)) for i in self.code if any(map(picture, self.cells[i].outputs))]

    def heading(self, cell: int) -> str:
        "Return the last heading at or before a cell."
        before = "\n".join(text for i, text in self.prose.items() if i <= cell)
        return re.findall(r"^#+ +(.+?)\s*$", before, re.M)[-1]

    def section(self, heading: str) -> str:
        "Return the prose under a heading of the second level, or an empty string."
        match = re.search(
            rf"^## +{re.escape(heading)}\s*$(.*?)(?=^## |\Z)", "\n\n".join(self.prose.values()), re.M | re.S
        )
        return match[1] if match else ""


def picture(output) -> str | None:
    "Return the PNG that an output of a cell holds, in base64, or None."
    return output.get("data", {}).get("image/png")


def defined(source: str) -> list[str]:
    "Return the names that a cell defines at its top level, imports apart."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if name != "__all__"]


def read_book(folder: Path = ROOT / "nbs") -> list[Chapter]:
    "Return all chapters, in their order."
    return [Chapter(path) for path in sorted(folder.glob("[0-9]*.ipynb"))]


def parts(book: list[Chapter]) -> dict[str, list[Chapter]]:
    "Return the chapters of every part that has one, the part that may be skipped last."
    names = [*PARTS, PLUMBING]
    return {name: there for name in names if (there := [chapter for chapter in book if chapter.part == name])}


def homes(book: list[Chapter]) -> dict[str, tuple[Chapter, int]]:
    "Return, for every name that is exported once, the chapter and the index of the cell that exports it."
    places = {}
    for chapter in book:
        for name, cell in chapter.exports.items():
            places.setdefault(name, []).append((chapter, cell))
    return {name: place[0] for name, place in places.items() if len(place) == 1}


def line_of(name: str, module: str) -> int:
    "Return the line of `ddpm_lit/<module>.py` on which a name is defined."
    lines = (ROOT / "ddpm_lit" / f"{module}.py").read_text(encoding="utf-8").splitlines()
    pattern = re.compile(rf"(def|class) {re.escape(name)}\b|{re.escape(name)}\b[^=]*=|.*\b{re.escape(name)}\b.* = ")
    return next(i for i, line in enumerate(lines, 1) if pattern.match(line))
