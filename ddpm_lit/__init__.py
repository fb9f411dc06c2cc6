"""Denoising diffusion, from the Gaussian up. Every public name of every chapter, imported when it is first used."""

from functools import cache
from importlib import import_module

__version__ = "0.1.0"


@cache
def _homes() -> dict[str, str]:
    "Return the module of each public name, from the `__all__` of every chapter, which is read without importing it."
    import ast
    from pathlib import Path

    homes = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        for line in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", None) == "__all__":
                homes.update(dict.fromkeys(ast.literal_eval(line.value), f"ddpm_lit.{path.stem}"))
    return homes


def __getattr__(name: str):
    if name == "__all__":
        return sorted(_homes())
    if name.startswith("__") or name not in _homes():
        from ddpm_lit._renamed import explain

        raise explain(name)
    return globals().setdefault(name, getattr(import_module(_homes()[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})
