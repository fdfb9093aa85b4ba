"""The real SLURM of this machine that tests/slurm runs on: started, asked, and broken on purpose."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "local_cluster.sh"


def call(*words: str, patience_s: float = 60.0) -> str:
    """stdout of ``local_cluster.sh WORDS``. Raises RuntimeError with its sentence where it fails."""
    done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=patience_s, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


@contextmanager
def cluster() -> Iterator[None]:
    """A cluster for as long as the block lasts, and SLURM_CONF set to it; one that was up before stays up."""
    before = os.environ.get("SLURM_CONF")
    already = call("up").startswith("already up")
    os.environ["SLURM_CONF"] = call("env").strip().rpartition("=")[2]
    try:
        yield
    finally:
        if not already:
            call("down")
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
