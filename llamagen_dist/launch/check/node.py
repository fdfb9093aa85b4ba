"""What one rank sees of its node: versions, devices, memory and room. Imports torch only for the devices."""

import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

from llamagen_dist.process import cores, memory_gb
from llamagen_dist.tracking.provenance import PACKAGES, versions


def name() -> str:
    """SLURM's name of this node, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def facts(shared: Path) -> dict[str, Any]:
    """Of this rank; sizes in GB (10^9 bytes). shared: a folder on the disk that all nodes see."""
    folders = {"shared": shared, "tmp": Path(os.environ.get("TMPDIR", "/tmp")), "shm": Path("/dev/shm")}
    if stage := os.environ.get("LLAMAGEN_STAGE"):
        folders["stage"] = Path(stage)
    return {
        "host": platform.node(),
        "kernel": platform.release(),
        "versions": versions(*PACKAGES),
        "cores": cores(),
        "memory_gb": memory_gb(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "space": {what: space(path) for what, path in folders.items()},
        **devices(),
    }


def space(path: Path) -> dict[str, Any]:
    """free_gb, and inodes that are left (absent where the file system does not count them)."""
    try:
        disk = os.statvfs(path)
    except OSError as error:
        return {"path": str(path), "error": error.strerror}
    room: dict[str, Any] = {"path": str(path), "free_gb": round(disk.f_bavail * disk.f_frsize / 1e9, 3)}
    if disk.f_files:
        room["inodes"] = disk.f_favail
    return room


def devices() -> dict[str, Any]:
    """visible: how many GPUs this rank can use. gpu: the one it will use. driver: its version, where nvidia-smi is."""
    import torch

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts: dict[str, Any] = {"visible": visible}
    if visible:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        mine = local if local < visible else 0
        about = torch.cuda.get_device_properties(mine)
        free, total = torch.cuda.mem_get_info(mine)
        facts["gpu"] = {
            "name": about.name,
            "uuid": str(getattr(about, "uuid", "")),
            "memory_gb": round(total / 1e9, 2),
            "free_gb": round(free / 1e9, 2),
        }
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            facts["driver"] = done.stdout.split()[0]
    return facts
