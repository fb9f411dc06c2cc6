"""What all tests share: this folder is importable, and the markers of pyproject.toml."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The folder of a run with a tiny network of five steps."
    from doubles import linear_schedule, tiny_model

    folder = tmp_path_factory.mktemp("tiny") / "run"
    tiny_model(linear_schedule(5, 1e-4, 0.5)).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def digits():
    from ddpm_lit.loading import load_images

    return load_images("digits")
