"""What all tests share: this folder is importable, and the markers of pyproject.toml."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
