"""What the ranks' reports are searched for, and what to do about each. Pure functions; light to import."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llamagen_dist.errors import LOST_PEER

PARTS = ("node", "disk", "join", "clock", "shared", "all_reduce", "step")
CLOCK_WARN_S, CLOCK_BAD_S = 1.0, 60.0
SEEN_WARN_S = 2.0
SMALL_FILE_WARN_S, WRITE_WARN_MB_S = 1.0, 50.0
SPACE_WARN_GB, SPACE_BAD_GB, INODES_WARN = 50.0, 1.0, 10_000
MEMORY_WARN_GB = 2.0  # per rank
OPEN_FILES_WARN = 1024
BUS_WARN_GB_S = {"nccl": 5.0, "gloo": 0.01}
GPU_TAKEN_WARN = 0.1
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """text: what, where, and what to do about it. A problem is what a run would stumble over."""

    level: Literal["problem", "warning"]
    text: str


def problem(text: str) -> Finding:
    return Finding("problem", text)


def warning(text: str) -> Finding:
    return Finding("warning", text)


def silent(reports: Sequence[Report], ranks: int, ended: str) -> Iterator[Finding]:
    silent = sorted(set(range(ranks)) - {report["rank"] for report in reports})
    if silent:
        who = f"rank {silent[0]}" if len(silent) == 1 else f"{len(silent)} of {ranks} ranks ({_numbers(silent)})"
        why = f" ({ended})" if ended else ""
        yield problem(f"{who} left no report{why}: does the profile's python start there, and is the folder shared?")


def failed(reports: Sequence[Report], ended: str) -> Iterator[Finding]:
    advice = {
        "node": "python there cannot use what it needs",
        "disk": "the run folder is not to be written there: choose one on the disk that all nodes share",
        "join": "the ranks do not reach the first node: name the network interface that the nodes share "
        "(exports: {GLOO_SOCKET_IFNAME: …}, nccl: {SOCKET_IFNAME: …}), and let ports 15000-32000 pass between them",
        "clock": "ranks lose each other: see the other findings and the logs",
        "shared": "the shared disk does not do what locks and checkpoints need",
        "all_reduce": "collectives fail: NCCL_DEBUG=INFO in exports says which network NCCL has chosen",
        "step": "a training step fails where everything before it works: the log has the traceback",
    }
    died: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        if "doing" in report:
            died[report["doing"]].append(report)
    by_cause: dict[tuple[str, str], list[Report]] = defaultdict(list)
    for report in reports:
        if "problem" in report:
            part, error = report["problem"]["part"], report["problem"]["error"]
            if not (part in died and LOST_PEER.search(error)):  # then it only lost those that died
                by_cause[part, re.sub(r"\d+", "#", error)].append(report)
    # the part that failed first explains the others
    for part in PARTS:
        if part in died:
            how = f" ({ended})" if ended else ""
            yield problem(f"{_who(died[part])} did not come to the end of {part}{how}: {advice[part]}")
        for those in (those for (where, _), those in by_cause.items() if where == part):
            yield problem(f"{_who(those)}: {part}: {those[0]['problem']['error']}: {advice[part]}")


def layout(reports: Sequence[Report], nodes: int, ranks_per_node: int) -> Iterator[Finding]:
    per_node = Counter(report["where"] for report in reports)
    for name, count in sorted(per_node.items()):
        if count > ranks_per_node:
            yield problem(f"{name} has {count} ranks instead of {ranks_per_node}: leave task counts to the profile")


def versions(reports: Sequence[Report]) -> Iterator[Finding]:
    known = [report for report in reports if "node" in report]
    for package in sorted({name for report in known for name in report["node"]["versions"]}):
        found = _nodes_by(known, _version(package))
        if len(found) > 1:
            different = "; ".join(f"{version} on {nodes}" for version, nodes in found.items())
            yield problem(
                f"{package} differs between nodes ({different}): let python in the profile name one environment on "
                "the shared disk"
            )
        elif "absent" in found:
            yield warning(f"{package} is absent: install it in the environment of the profile's python")
    drivers = _nodes_by([r for r in known if "driver" in r["node"]], lambda report: report["node"]["driver"])
    if len(drivers) > 1:
        different = "; ".join(f"{version} on {nodes}" for version, nodes in drivers.items())
        yield warning(f"the GPU driver differs between nodes ({different}): ask for nodes that are alike (constraint)")


def devices(reports: Sequence[Report], gpus_per_node: int) -> Iterator[Finding]:
    if not gpus_per_node:
        return
    known = [report for report in reports if "node" in report]
    blind = [r for r in known if r["node"]["visible"] not in (1, *range(r["ranks_on_node"], 1000))]
    if blind:
        seen = blind[0]["node"]["visible"]
        yield problem(
            f"{_who(blind)}: torch sees {seen or 'no'} GPU{'s' * (seen != 1)} for {blind[0]['ranks_on_node']} ranks: "
            "is it a build of torch for CUDA, does nvidia-smi work there, and does the profile ask for the GPUs?"
        )
    users = defaultdict(list)
    for report in known:
        if report["node"].get("gpu", {}).get("uuid"):
            users[report["where"], report["node"]["gpu"]["uuid"]].append(report)
    for those in users.values():
        if len(those) > 1:
            yield problem(f"{_who(those)} would share one GPU: let every rank see its own, or all of its node's")
    kinds = _nodes_by([r for r in known if "gpu" in r["node"]], lambda report: report["node"]["gpu"]["name"])
    if len(kinds) > 1:
        different = "; ".join(f"{name} on {nodes}" for name, nodes in kinds.items())
        yield warning(f"GPUs differ ({different}): all wait for the slowest; name one kind (constraint)")
    for report in known:
        gpu = report["node"].get("gpu")
        if gpu and gpu["memory_gb"] - gpu["free_gb"] > GPU_TAKEN_WARN * gpu["memory_gb"]:
            yield warning(
                f"{_who([report])}: {gpu['memory_gb'] - gpu['free_gb']:.1f} of {gpu['memory_gb']:.1f} GB of its GPU "
                "are taken by somebody else: ask the site, or leave the node out (sbatch: {exclude: …})"
            )


def room(reports: Sequence[Report]) -> Iterator[Finding]:
    firsts = _firsts(reports, "node")
    for report in firsts[:1]:
        shared = report["node"]["space"]["shared"]
        free = shared.get("free_gb", 0.0)
        if free < SPACE_WARN_GB:
            yield (problem if free < SPACE_BAD_GB else warning)(
                f"the shared disk at {shared['path']} has {free:.1f} GB free: a checkpoint of GPT-B takes 1.3 GB, of "
                "GPT-3B 37; make room, or choose another run folder"
            )
        if shared.get("inodes", INODES_WARN) < INODES_WARN:
            yield warning(f"the shared disk at {shared['path']} takes only {shared['inodes']} more files: make room")
    for report in firsts:
        facts, where = report["node"], report["where"]
        for what in ("tmp", "stage"):
            room = facts["space"].get(what)
            if room is None:
                continue
            if "error" in room:
                yield problem(f"{where}: {room['path']}: {room['error']}: name a folder that every node has")
            elif room["free_gb"] < SPACE_BAD_GB:
                yield warning(
                    f"{where}: {room['path']} has {room['free_gb']:.2f} GB free: name another (TMPDIR, stage)"
                )
        room = facts["space"].get("shm", {})
        if room.get("free_gb", SPACE_BAD_GB) < SPACE_BAD_GB:
            yield warning(
                f"{where}: /dev/shm has {room['free_gb']:.2f} GB: data workers and NCCL use it; a container "
                "needs --shm-size"
            )
        if facts["memory_gb"] < MEMORY_WARN_GB * report["ranks_on_node"]:
            yield warning(
                f"{where}: {facts['memory_gb']:.1f} GB of memory are free for {report['ranks_on_node']} ranks: ask for "
                "more (memory_gb)"
            )
        if facts["files"] < OPEN_FILES_WARN:
            yield warning(f"{where}: a process may open only {facts['files']} files: raise it in setup (ulimit -n)")


def disk(reports: Sequence[Report]) -> Iterator[Finding]:
    slow = [r for r in _firsts(reports, "disk") if r["disk"]["write_mb_s"] < WRITE_WARN_MB_S]
    if slow:
        worst = min(report["disk"]["write_mb_s"] for report in slow)
        yield warning(
            f"{_nodes(slow)}: {worst:.0f} MB/s to the shared disk: a checkpoint of GPT-B (1.3 GB) takes "
            f"{1300 / worst:.0f} s; choose a faster disk, or save less often"
        )
    slow = [r for r in _firsts(reports, "disk") if r["disk"]["small_s"] > SMALL_FILE_WARN_S]
    if slow:
        worst = max(report["disk"]["small_s"] for report in slow)
        yield warning(f"{_nodes(slow)}: {worst:.1f} s for one small file on the shared disk, synced: expect slow saves")
    late = [r for r in _firsts(reports, "disk") if abs(r["disk"]["clock_s"]) > CLOCK_WARN_S]
    if late:
        worst = max((report["disk"]["clock_s"] for report in late), key=abs)
        yield warning(
            f"{_nodes(late)}: the clock that dates files differs by {worst:+.1f} s: ages that llamagen status shows "
            "are wrong by as much; ask the site for NTP"
        )


def shared(reports: Sequence[Report]) -> Iterator[Finding]:
    known = [report for report in reports if "shared" in report]
    if not known:
        return
    for number, how in enumerate(("made a file that must not exist", "gave one name to a file")):
        winners = known[0]["shared"]["winners"][number]
        if winners != 1:
            yield problem(
                f"{winners} nodes {how} on the shared disk where exactly one may: two launches of one run would not "
                "notice each other; keep runs on another disk"
            )
    for key, what in (("visible_s", "a renamed file"), ("replaced_s", "a file's new content")):
        blind = [report for report in known if report["shared"][key] is None]
        if blind:
            yield problem(
                f"{_nodes(blind)} did not see {what} of {_nodes(known[:1])}: is it one disk? Otherwise mount it "
                "without caching of attributes (noac, or actimeo=1)"
            )
            continue
        slowest = max(known, key=lambda report: report["shared"][key])
        if slowest["shared"][key] > SEEN_WARN_S:
            yield warning(
                f"{slowest['where']} saw {what} only after {slowest['shared'][key]:.1f} s: launches and resumes wait "
                "as long; ask for actimeo=1"
            )
    unlocked = [report for report in known if not report["shared"]["flock"]]
    if unlocked:
        yield warning(
            f"{_nodes(unlocked)}: a lock (flock) held by {_nodes(known[:1])} is not seen: runs are kept apart by other "
            "means, but programs started by hand, without llamagen launch, are not"
        )


def clocks(reports: Sequence[Report]) -> Iterator[Finding]:
    off = [r for r in _firsts(reports, "clock") if abs(r["clock"]["offset_s"]) - r["clock"]["error_s"] > CLOCK_WARN_S]
    if off:
        worst = max((report["clock"]["offset_s"] for report in off), key=abs)
        level = problem if abs(worst) > CLOCK_BAD_S else warning
        yield level(
            f"{_nodes(off)}: clock {worst:+.1f} s against {_nodes(reports[:1])}: logs cannot be compared and SLURM's "
            "credentials may be refused; ask the site for NTP"
        )


def speed(reports: Sequence[Report]) -> Iterator[Finding]:
    known = [report["all_reduce"] for report in reports if "all_reduce" in report]
    if known and (slowest := min(one["bus_gb_s"] for one in known)) < BUS_WARN_GB_S[known[0]["backend"]]:
        yield warning(
            f"all-reduce at {slowest:.3g} GB/s over {known[0]['backend']}: is it the wrong network? Name the fast one "
            "(nccl: {SOCKET_IFNAME: …, IB_HCA: …}); NCCL_DEBUG=INFO in exports says what is used"
        )


def steps(reports: Sequence[Report], gpus_per_node: int) -> Iterator[Finding]:
    known = [report for report in reports if "step" in report]
    # where torch sees none, that has been said
    slow = [r for r in known if gpus_per_node and r["node"]["visible"] and not r["step"]["device"].startswith("cuda")]
    if slow:
        yield problem(f"{_who(slow)} trained on {slow[0]['step']['device']}, not on a GPU: is torch a build for CUDA?")
    for report in known:
        step = report["step"]
        first, second = step["losses"]
        falls = first is not None and second is not None and second < first
        if not falls or abs(first - step["expected"]) > 0.2:
            yield problem(
                f"{_who([report])}: the losses of two steps are {first} and {second}; they should begin at "
                f"{step['expected']:.4f} and fall: this node computes wrongly, or its libraries do"
            )
            return
    unequal = [report for report in known if not report["step"]["equal"]]
    if unequal:
        yield problem("after one step the ranks' weights are not the same: gradients were not added up rightly")


def _firsts(reports: Iterable[Report], part: str) -> list[Report]:
    """One report per node, of those that came so far."""
    found: dict[str, Report] = {}
    for report in reports:
        if part in report:
            found.setdefault(report["where"], report)
    return list(found.values())


def _version(package: str) -> Callable[[Report], str]:
    return lambda report: str(report["node"]["versions"].get(package, "absent"))


def _nodes_by(reports: Sequence[Report], key: Callable[[Report], str]) -> dict[str, str]:
    """What ``key`` says -> the nodes that say so."""
    groups: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        groups[key(report)].append(report)
    return {value: _nodes(those) for value, those in sorted(groups.items())}


def _nodes(reports: Sequence[Report]) -> str:
    names = sorted({report["where"] for report in reports})
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _who(reports: Sequence[Report]) -> str:
    ranks = sorted(report["rank"] for report in reports)
    return f"rank{'s' * (len(ranks) > 1)} {_numbers(ranks)} on {_nodes(reports)}"


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
