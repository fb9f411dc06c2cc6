"""What is built, and what it needs: the wheel and the sdist, an empty environment, the lazy package.

The wheel is installed by pip into an environment of its own, under the pinned versions, and trains there.
"""

import ast
import email
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ddpm_lit

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "ddpm_lit").glob("*.py"))
MODELS = sorted(path for path in (ROOT / "models").rglob("*") if path.is_file())
CHAPTERS = [path.stem for path in SOURCES if path.stem[0] != "_"]
SLOW = {"matplotlib", "sklearn", "accelerate", "PIL", "datasets", "pandas", "diffusers", "scipy"}
# Of these, nothing may be needed to train and to sample.
DEVELOPMENT = {
    *("nbdev", "fastcore", "execnb", "ghapi", "jupytext", "nbstripout", "nbconvert", "nbformat"),
    *("hypothesis", "beartype", "diffusers", "build", "jupyterlab", "ipykernel", "IPython", "nbval", "pytest", "xdist"),
    *("mlxtend", "pandas"),
}


def settings() -> dict[str, str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def run(*command, **options) -> str:
    "The standard output of a command; its whole output is shown where it fails."
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, encoding="utf-8", **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------------------------------------- what is built


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> dict[str, Path]:
    "The sdist, the wheel made from it, and the wheel made from the tree itself; built from a copy."
    tree, out = tmp_path_factory.mktemp("tree") / "ddpm_lit", tmp_path_factory.mktemp("built")
    clutter = (".*", "build", "dist", "demo", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*clutter))
    for kind in (["--sdist"], ["--wheel"]):
        run(sys.executable, "-m", "build", "--no-isolation", *kind, "--outdir", out / "tree", tree)
    (sdist,) = (out / "tree").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "sdist", filter="data")
    (unpacked,) = (out / "sdist").iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out / "from_sdist", unpacked)
    (wheel,), (second,) = ((out / where).glob("*.whl") for where in ("tree", "from_sdist"))
    return {"sdist": unpacked, "wheel": wheel, "wheel_of_sdist": second}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_library_and_nothing_else(built):
    inside = contents(built["wheel"])
    expected = {f"ddpm_lit/{path.name}": path for path in SOURCES}
    expected |= {f"ddpm_lit/{path.relative_to(ROOT).as_posix()}": path for path in MODELS}
    assert {name: data for name, data in inside.items() if "dist-info" not in name} == {
        name: path.read_bytes() for name, path in expected.items()
    }
    assert built["wheel"].stat().st_size < 30e6 and max(path.stat().st_size for path in MODELS) < 8e6
    (licence,) = (data for name, data in inside.items() if name.endswith("/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_holds_the_book_and_builds_the_same_wheel(built):
    assert contents(built["wheel_of_sdist"]) == contents(built["wheel"])
    here = {p.relative_to(ROOT) for folder in ("nbs", "tests") for p in (ROOT / folder).glob("*.[ip]*y*")}
    there = {p.relative_to(built["sdist"]) for p in built["sdist"].rglob("*") if p.is_file()}
    assert here and here <= there
    assert {Path(name) for name in ("settings.ini", "constraints.txt", "Makefile", "LICENSE", "README.md")} <= there


def test_the_metadata_is_that_of_the_settings(built):
    cfg = settings()
    (text,) = (data for name, data in contents(built["wheel"]).items() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(text)
    assert metadata["Name"] == cfg["lib_name"] and metadata["Summary"] == cfg["description"]
    assert metadata["Version"] == cfg["version"] == ddpm_lit.__version__
    assert metadata["Requires-Python"] == f">={cfg['min_python']}"
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {str(need) for need in needs if need.marker is None}
    assert plain == {str(Requirement(text)) for text in cfg["requirements"].split()}
    for extra in ("notebooks", "data", "emoji", "stable-diffusion", "book", "dev"):
        there = {need.name for need in needs if need.marker and need.marker.evaluate({"extra": extra})}
        listed = cfg[f"{extra.replace('-', '_')}_requirements"].split()
        assert {Requirement(text).name for text in listed} <= there, extra
    (scripts,) = (data for name, data in contents(built["wheel"]).items() if name.endswith("/entry_points.txt"))
    assert "ddpm_lit = ddpm_lit.cli:main" in scripts.decode()


def test_every_import_of_the_library_is_a_requirement():
    cfg, homes = settings(), packages_distributions()
    allowed = {canonicalize_name(Requirement(text).name) for text in cfg["requirements"].split()}
    homes_of = dict(data={"sources.py", "images.py"}, emoji={"emoji.py"}, stable_diffusion={"latent.py"})
    optional = {
        canonicalize_name(Requirement(text).name): homes
        for extra, homes in homes_of.items()
        for text in cfg[f"{extra}_requirements"].split()
    }
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found.update({name.split(".")[0]: path.name for name in names})
    outside = {k: v for k, v in found.items() if k not in sys.stdlib_module_names | {"ddpm_lit"}}
    needed = {canonicalize_name(homes.get(name, [name])[0]): (name, file) for name, file in outside.items()}
    assert {d: where for d, where in needed.items() if d not in allowed | optional.keys()} == {}
    assert {d for d in needed if d in optional and needed[d][1] not in optional[d]} == set()
    assert allowed - set(needed) == set(), "required and nowhere imported"


def test_every_requirement_is_pinned_within_its_range():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines) and not any("+" in version for version in pins.values())
    cfg = settings()
    for extra in ("", "notebooks_", "data_", "emoji_", "stable_diffusion_", "book_", "dev_"):
        for text in cfg[f"{extra}requirements"].split():
            need = Requirement(text)
            if need.name not in ("setuptools", "wheel"):
                assert need.specifier.contains(pins[canonicalize_name(need.name)]), text


# ---------------------------------------------------------------------------------------------- an empty environment


@pytest.fixture(scope="session")
def empty(built, tmp_path_factory) -> Path:
    "The Python of a new environment that holds the wheel and what it requires."
    folder = tmp_path_factory.mktemp("empty") / "env"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt")
    apart(sys.executable, folder, "-m", "pip", "--python", python, "install", *options, built["wheel"])
    return python


def apart(program: Path, folder: Path, *command) -> str:
    "Run a program in `folder`, with nothing of this process and its paths in sight."
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return run(program, *command, cwd=folder, env=mine | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})


def test_nothing_of_development_is_installed(empty, tmp_path):
    code = f"""
import importlib, importlib.util, json
for chapter in {CHAPTERS}:
    importlib.import_module("ddpm_lit." + chapter)
import ddpm_lit
print(json.dumps([ddpm_lit.__file__, [name for name in {sorted(DEVELOPMENT)} if importlib.util.find_spec(name)]]))
"""
    where, present = json.loads(apart(empty, tmp_path, "-c", code))
    assert Path(where).is_relative_to(empty.parents[1])
    assert present == []


def test_it_trains_and_samples_there(empty, tmp_path):
    few = ("--steps", "4", "--samples", "20", "--sampling-steps", "4", "--no-progress")
    said = apart(empty, tmp_path, "-m", "ddpm_lit", "demo", *few)
    assert {path.name for path in tmp_path.iterdir()} == {"demo"}
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == 4 and metrics["versions"]["ddpm_lit"] == ddpm_lit.__version__
    for name in ("samples.png", "loss.png"):
        assert name in said and (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
    # And by the command that the wheel installs, from the model just written.
    apart(empty.with_name("ddpm_lit"), tmp_path, "sample", "demo", "-n", "2", "--steps", "2", "--out", "two.npz")
    assert zipfile.ZipFile(tmp_path / "two.npz").namelist() == ["images.npy"]
    # A model that ships with the package, without a network.
    apart(empty.with_name("ddpm_lit"), tmp_path, "sample", "digits", "-n", "64")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------- the lazy package


def test_importing_the_package_imports_nothing_slow():
    code = """
import sys
before = set(sys.modules)
import ddpm_lit
assert "linear_schedule" in dir(ddpm_lit)
print(*{name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    assert run(sys.executable, "-c", code).split() == ["ddpm_lit"]


def test_importing_a_chapter_imports_no_plots_and_no_other_frameworks():
    code = f"""
import importlib, sys
for chapter in {CHAPTERS}:
    importlib.import_module("ddpm_lit." + chapter)
    slow = {SLOW} & set(sys.modules)
    assert not slow, f"{{chapter}} imports {{slow}}"
"""
    run(sys.executable, "-c", code)


def test_every_public_name_is_found_at_the_top():
    names = {}
    for chapter in CHAPTERS:
        module = importlib.import_module(f"ddpm_lit.{chapter}")
        for name in getattr(module, "__all__", []):
            assert getattr(ddpm_lit, name) is getattr(module, name), f"{chapter}.{name}"
            assert name in dir(ddpm_lit)
            names.setdefault(name, []).append(chapter)
    assert {name: where for name, where in names.items() if len(where) > 1} == {}, "one name, two meanings"
    assert set(names) & set(CHAPTERS) == set(), "a name that hides a module"
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_the_kind'"):
        _ = ddpm_lit.nothing_of_the_kind
