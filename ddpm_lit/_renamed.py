"""Where the public names of earlier versions are now."""

NOW: dict[str, str] = {}


def explain(name: str) -> Exception:
    "Return the error for a name that `ddpm_lit` does not have; it says where an earlier name is now."
    if name in NOW:
        return ImportError(f"ddpm_lit.{name} is now ddpm_lit.{NOW[name]}")
    return AttributeError(f"module 'ddpm_lit' has no attribute {name!r}")
