"""Processes of this machine: which is which (a pid alone is reused), their cores, memory and signals."""

import os
import re
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass(frozen=True)
class Identity:
    """A process: its pid and when it started (kernel ticks since boot; empty without /proc)."""

    pid: int
    started: str

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie has ended, a reused pid is another process."""
        if not _exists(self.pid):
            return False
        state, started = _proc_stat(self.pid)
        return state not in ("Z", "X") and started == self.started


def identify(pid: int | None = None) -> Identity:
    """The identity of a live process; of this one by default."""
    pid = os.getpid() if pid is None else pid
    return Identity(pid, _proc_stat(pid)[1])


def started_at(pid: int) -> float | None:
    """When a process of this machine began, in seconds since the epoch; None where it has ended, or without /proc."""
    ticks = _proc_stat(pid)[1]
    if not ticks:
        return None
    booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(booted.split()[1]) + int(ticks) / os.sysconf("SC_CLK_TCK")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's process
    return True


def _proc_stat(pid: int) -> tuple[str, str]:
    """State letter and start time from /proc/PID/stat (proc(5)); empty strings without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # the command name before it may hold spaces and brackets
    return fields[0], fields[19]


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_gb(children: bool = False) -> float:
    """Largest resident set of this process so far, in GB (10^9 bytes). children: or of one child that has ended."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, KiB on Linux
    if children:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
        return max(peak_rss_gb(), ended)
    # getrusage of a started program remembers the process that started it (vfork, then exec): the kernel's own line
    # of this address space does not
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def memory_gb() -> float:
    """Memory that is free for new processes, in GB; 0 where that is unknown (no Linux).

    A job's control group may allow less than the machine has, and SLURM kills what exceeds it.
    """
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return round(free / 1e9, 3)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
