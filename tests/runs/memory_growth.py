"""How much a program's memory grows, measured where nothing else has run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def growth_alone(module: str, folder: Path, *flags: bool) -> float:
    """MB that ``module.growth(folder, *flags)`` measures, in a process of its own: in one that has run other tests,
    what is kept fits into memory that they gave back."""
    code = f"from {module} import *; print(growth(Path({str(folder)!r}), *{flags!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return float(ran.stdout.split()[-1])
