"""The helper modules of scripts/gpu_check are importable as `gpu`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
