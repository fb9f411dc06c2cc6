"""The house keeps its order: one idea in one module, imports in one direction, few public names, the field's words."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import ddpm_lit
from ddpm_lit import _renamed

ROOT = Path(__file__).parents[1]
# Imports only ever point to the left. A new module takes its place here, as in the table of the README.
ORDER = """
    checks gaussian forward posterior ddpm bound objective exact
    layers unet conditional files processes claims pretrained images decoding captions sources emoji loading
    trainer sampler neighbours metrics evaluation improved solvers guidance autoencoder latent text glide options
    latent_options drawing cli
""".split()
MODULES = {name: (ROOT / "ddpm_lit" / f"{name}.py").read_text(encoding="utf-8") for name in ORDER}
CHAPTERS = {path.stem: nbformat.read(path, 4) for path in sorted((ROOT / "nbs").glob("*.ipynb"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(chapter: str) -> list[str]:
    "Return the sources of a chapter's code cells."
    return [cell.source for cell in CHAPTERS[chapter].cells if cell.cell_type == "code"]


def home(chapter: str) -> str | None:
    "Return the module that a chapter exports, or None."
    names = re.findall(r"^#\|\s*default_exp\s+(\w+)", "\n".join(code(chapter)), re.M)
    return names[0] if names else None


# ------------------------------------------------------------------------------------------------------------- rooms


def test_every_module_has_its_place_and_its_chapter():
    there = {path.stem for path in (ROOT / "ddpm_lit").glob("[a-z]*.py")}
    assert there == set(ORDER)
    in_chapters = [home(chapter) for chapter in CHAPTERS if home(chapter)]
    assert in_chapters == list(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_is_short(name):
    assert len(MODULES[name].splitlines()) <= 450


def imports(name: str) -> set[str]:
    "Return the modules of the package that a module imports, inside functions too."
    names = set()
    for node in ast.walk(ast.parse(MODULES[name])):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "ddpm_lit"):
            parts = (node.module or "").removeprefix("ddpm_lit").strip(".")
            names |= {parts} if parts else {alias.name for alias in node.names}
    return names & set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_up(name):
    assert all(ORDER.index(other) < ORDER.index(name) for other in imports(name)), imports(name)


AHEAD = {"ddpm": {"sampler", "pretrained"}, "trainer": {"improved"}, "sampler": {"solvers"}}
AHEAD |= {"pretrained": {"latent"}}


def test_four_modules_look_ahead_and_say_where():
    ahead = {name: set(re.findall(r'import_module\("ddpm_lit\.(\w+)"\)', MODULES[name])) for name in ORDER}
    assert {name: found for name, found in ahead.items() if found} == AHEAD


OWNERS = {
    r"\bos\.environ\b|\bgetenv\b": {"processes"},
    r"\bhashlib\b": {"files"},
    r"\btqdm\b": {"processes"},
    r"\bos\.fsync\b": {"files"},
    r"\bos\.replace\b|\.replace\(path\)": {"files"},
    r"\bPartialState\b": {"processes"},
    r"\btorch\.autocast\b": {"processes"},
    r"\bmax_memory_allocated\b|\bgetrusage\b": {"processes"},
}


@pytest.mark.parametrize("pattern", OWNERS)
def test_one_owner(pattern):
    assert {name for name in ORDER if re.search(pattern, MODULES[name])} <= OWNERS[pattern]


def test_the_command_line_defines_no_function_that_a_user_would_want():
    from ddpm_lit import cli

    defined = {node.name for node in ast.parse(MODULES["cli"]).body if isinstance(node, ast.FunctionDef)}
    assert not hasattr(cli, "__all__") or cli.__all__ == []
    used = {word for name in ORDER[:-1] for word in re.findall(r"\w+", MODULES[name])}
    assert "main" in defined and not defined & set(re.findall(r"ddpm_lit\.(\w+)", README)) and "cli" not in used


# ------------------------------------------------------------------------------------------------------ public names


def public() -> dict[str, str]:
    "Return the module of every public name."
    return {
        word: name for name in ORDER for word in getattr(importlib.import_module(f"ddpm_lit.{name}"), "__all__", [])
    }


def test_public_names_are_few():
    assert len(public()) <= 90
    assert sorted(public()) == ddpm_lit.__all__ == sorted(set(ddpm_lit.__all__))


def test_every_public_name_is_used_by_another_module_another_chapter_or_the_readme():
    unused = []
    for word, module in public().items():
        pattern = re.compile(rf"\b{word}\b")
        modules = (text for name, text in MODULES.items() if name != module)
        chapters = ("\n".join(code(chapter)) for chapter in CHAPTERS if home(chapter) != module)
        if not any(pattern.search(text) for text in (*modules, *chapters, README)):
            unused.append(word)
    assert unused == []


def test_a_star_import_brings_exactly_the_public_names():
    program = "from ddpm_lit import *; print(*sorted(n for n in dir() if n[0] != '_' or n == '__all__'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(public())


def test_an_earlier_name_is_refused_with_the_one_that_it_has_now():
    assert _renamed.NOW and not _renamed.NOW.keys() & public().keys()
    for old, new in _renamed.NOW.items():
        module, _, word = new.rpartition(".")
        assert hasattr(importlib.import_module(f"ddpm_lit.{module}") if module else ddpm_lit, word), (old, new)
        with pytest.raises(ImportError, match=f"^ddpm_lit.{old} is now ddpm_lit.{re.escape(new)}$"):
            getattr(ddpm_lit, old)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        ddpm_lit.nonsense  # noqa: B018


# --------------------------------------------------------------------------------------------------------- language

# The glossary of CONTRIBUTING.md, as far as a machine can read it: none of these is a name, or a part of one.
PRIVATE = set(
    "law laws deviation deviations share shares shelf shelves turn turns way ways pile piles told asked found kept "
    "stretch noting said draft drafts whole plainly frugally".split()
)
NOT_OURS = {
    "found_inf",
    "share_memory_",
    "FileNotFoundError",
    "LocalEntryNotFoundError",
}  # of torch, Python and the Hub


def identifiers(source: str) -> set[str]:
    "Return all names that a program defines or reads, its keyword arguments and attributes too."
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(asname=str(name)):
                names.add(name)
    return names - NOT_OURS


def private(source: str) -> set[str]:
    "Return the names with a private word in them."
    parts = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_") for name in identifiers(source)}
    return {name for name, words in parts.items() if set(words) & PRIVATE}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_speaks_the_language_of_the_field(chapter):
    plain = (re.sub(r"^[%!].*$", "", source, flags=re.M) for source in code(chapter))
    assert {name for source in plain for name in private(source)} == set()


def test_the_private_words_are_recognised():
    assert private("told = f(shelf=1); asked_for = x.turns\ndef go(way): pass\nclass DrawnShare: pass") == {
        *("told", "shelf", "asked_for", "turns", "way", "DrawnShare")
    }
    assert private("optimizer.found_inf, await_, weight, turned") == set()


@pytest.mark.parametrize("name", ORDER)
def test_docstrings_begin_with_a_verb_or_a_noun(name):
    for node in ast.walk(ast.parse(MODULES[name])):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            first = doc.split()[0].strip("`,.:")
            assert first not in {"What", "Those", "Whether", "How", "Who", "Whoever", "Where", "It", "Within"}, (
                node.name
            )
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and "property" not in ast.dump(node):
                assert first not in {"The", "A", "An", "All", "One", "Every", "Each", "So"}, f"{node.name}: {doc[:60]}"
