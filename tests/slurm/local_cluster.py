"""The real SLURM of this machine that tests/slurm runs on: started, asked, and broken on purpose."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "local_cluster.sh"
DIR, PORT, NODES = "LLAMAGEN_SLURM_DIR", "LLAMAGEN_SLURM_PORT", "LLAMAGEN_SLURM_NODES"


def call(*words: str, patience_s: float = 60.0) -> str:
    """stdout of ``local_cluster.sh WORDS``. Raises RuntimeError with its sentence where it fails."""
    done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=patience_s, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


@contextmanager
def cluster() -> Iterator[None]:
    """A cluster for as long as the block lasts, and SLURM_CONF set to it; one that was up before stays up."""
    with _environment():
        already = call("up").startswith("already up")
        os.environ["SLURM_CONF"] = call("env").strip().rpartition("=")[2]
        try:
            yield
        finally:
            if not already:
                call("down")


@contextmanager
def another_cluster(nodes: int) -> Iterator[None]:
    """A second one beside it, of so many nodes; its faults do not reach the first."""
    with _environment():
        os.environ[DIR] = os.environ.get(DIR, "/tmp/llamagen-slurm") + "-faults"
        os.environ[PORT] = str(int(os.environ.get(PORT, "16817")) + 100)
        os.environ[NODES] = str(nodes)
        with cluster():
            yield


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (DIR, PORT, NODES, "SLURM_CONF")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
