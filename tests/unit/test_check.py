"""``llamagen check``'s verdict: every report that a run would stumble over is named with what to do, no good one is."""

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamagen_dist.launch.check import disk
from llamagen_dist.launch.check.verdict import Verdict, judge, read_reports, report_of

ROOT = Path(__file__).resolve().parents[2]
Reports = list[dict[str, Any]]


def report(rank: int, gpu: bool = True) -> dict[str, Any]:
    """Of rank ``rank`` of 2 nodes x 2, all well."""
    local = rank % 2
    versions = {"python": "3.11.7", "torch": "2.14.1", "deepspeed": "0.19.8"}
    space = {"shared": {"path": "/shared/check", "free_gb": 900.0, "inodes": 10**7}}
    space |= {"tmp": {"path": "/tmp", "free_gb": 50.0}, "shm": {"path": "/dev/shm", "free_gb": 50.0}}
    facts: dict[str, Any] = {
        "rank": rank,
        "local_rank": local,
        "ranks_on_node": 2,
        "where": f"n{rank // 2 + 1}",
        "seconds": {},
        "node": {
            "versions": versions,
            "cores": 16,
            "memory_gb": 200.0,
            "files": 65536,
            "space": space,
            "visible": 2 if gpu else 0,
        },
        "join": {},
        "clock": {"offset_s": 0.001 * rank, "error_s": 0.0005},
        "shared": {"visible_s": 0.01, "replaced_s": 0.02, "winners": [1, 1], "flock": True},
        "all_reduce": {"backend": "nccl" if gpu else "gloo", "bytes": 1, "bus_gb_s": 40.0, "latency_us": 20.0},
        "step": {
            "device": f"cuda:{local}" if gpu else "cpu",
            "losses": [5.5452, 5.2],
            "expected": 5.5452,
            "seconds": 0.05,
            "equal": True,
        },
    }
    if gpu:
        facts["node"] |= {
            "driver": "570.1",
            "gpu": {"name": "A", "uuid": f"GPU-{rank}", "memory_gb": 80.0, "free_gb": 79.0},
        }
    if local == 0:
        facts["disk"] = {"write_mb_s": 900.0, "small_s": 0.01, "clock_s": 0.0}
    return facts


def good(gpu: bool = True) -> Reports:
    return [report(rank, gpu) for rank in range(4)]


def judged(reports: Reports, gpu: bool = True, ended: str = "") -> Verdict:
    return judge(json.loads(json.dumps(reports)), 2, 2, 2 if gpu else 0, ended)


@pytest.mark.parametrize("gpu", [True, False])
def test_a_good_cluster_is_ready_without_a_word_of_warning(gpu: bool) -> None:
    verdict = judged(good(gpu), gpu)
    assert (verdict.ready, verdict.findings) == (True, ())
    assert verdict.line.startswith(f"READY: 2 nodes x {'2 GPUs' if gpu else '2 CPU ranks'}: all-reduce 40 GB/s")
    assert "\n" not in verdict.line


def put(reports: Reports, rank: int, dotted: str, value: Any) -> None:
    section: Any = reports[rank]
    *path, last = dotted.split(".")
    for key in path:
        section = section[int(key)] if isinstance(section, list) else section[key]
    if isinstance(section, list):
        section[int(last)] = value
    else:
        section[last] = value


@pytest.mark.parametrize(
    ("rank", "dotted", "value", "level", "words"),
    [
        (3, "node.versions.torch", "2.13.0", "problem", ["torch differs", "2.13.0 on n2", "python in the profile"]),
        (2, "node.visible", 0, "problem", ["n2: torch sees 0 GPUs for 2 ranks"]),
        (3, "node.gpu.uuid", "GPU-2", "problem", ["ranks 2, 3 on n2", "share one GPU"]),
        (3, "node.gpu.name", "B", "warning", ["GPUs differ", "B on n2", "constraint"]),
        (1, "node.gpu.free_gb", 60.0, "warning", ["n1: 60.0 of 80.0 GB", "leave this node out"]),
        (0, "node.space.shared.free_gb", 20.0, "warning", ["/shared/check has 20.0 GB free"]),
        (0, "node.space.shared.free_gb", 0.5, "problem", ["make room"]),
        (2, "node.space.tmp.free_gb", 0.1, "warning", ["n2: /tmp", "TMPDIR"]),
        (2, "node.space.tmp", {"path": "/scratch", "error": "No such file"}, "problem", ["n2: /scratch: No such file"]),
        (2, "node.space.stage", {"path": "/nvme", "error": "No such file"}, "problem", ["n2: /nvme: No such file"]),
        (2, "node.space.shm.free_gb", 0.06, "warning", ["n2: /dev/shm", "--shm-size"]),
        (2, "disk.write_mb_s", 10.0, "warning", ["n2: 10 MB/s", "130 s"]),
        (0, "shared.winners.0", 2, "problem", ["n1: 2 nodes made one file", "keep runs elsewhere"]),
        (0, "shared.winners.1", 0, "problem", ["0 linked one name"]),
        (3, "shared.visible_s", None, "problem", ["n2: does not see what rank 0 wrote", "noac"]),
        (3, "shared.replaced_s", 5.0, "warning", ["n2: sees what rank 0 wrote after 5.0 s"]),
        (2, "clock.offset_s", 3.0, "warning", ["n2: clock +3.0 s against rank 0's"]),
        (2, "clock.offset_s", -3600.0, "problem", ["n2: clock -3600.0 s against rank 0's"]),
        (2, "all_reduce.bus_gb_s", 0.4, "warning", ["0.4 GB/s over nccl", "SOCKET_IFNAME"]),
        (2, "step.losses.1", None, "problem", ["n2: the losses of two steps are 5.5452 and None"]),
        (2, "step.losses.0", 0.0, "problem", ["not 5.5452 and less"]),
        (2, "step.losses.1", 5.6, "problem", ["5.5452 and 5.6"]),
        (1, "step.equal", False, "problem", ["weights are not the same"]),
        (1, "problem", {"part": "all_reduce", "error": "x"}, "problem", ["rank 1 on n1: all_reduce: x", "NCCL_DEBUG"]),
        (1, "doing", "step", "problem", ["rank 1 on n1 did not complete step"]),
    ],
)
def test_every_fault_is_named_with_what_to_do(rank: int, dotted: str, value: Any, level: str, words: list[str]) -> None:
    reports = good()
    put(reports, rank, dotted, value)
    verdict = judged(reports)
    assert verdict.ready == (level == "warning")
    assert [finding.level for finding in verdict.findings] == [level]
    assert all(word in verdict.findings[0].text for word in words), verdict.findings[0].text
    assert "\n" not in verdict.line


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("node.files", 256),
        ("node.memory_gb", 1.0),
        ("node.driver", "560.0"),
        ("disk.small_s", 2.5),
        ("disk.clock_s", -30.0),
        ("shared.flock", False),
    ],
)
def test_what_changes_nothing_that_a_user_does_is_in_the_report_and_no_finding(dotted: str, value: Any) -> None:
    reports = good()
    put(reports, 2, dotted, value)
    assert judged(reports).findings == ()


def test_a_rank_without_a_report_is_a_problem_and_the_jobs_end_is_told() -> None:
    verdict = judged(good()[:3], ended="job 7 was cancelled")
    assert "rank 3 of 4 left no report (job 7 was cancelled)" in verdict.findings[0].text
    assert "ranks 0, 1, 2, 3 of 4 left no report" in judged([]).line


def test_a_fault_of_several_nodes_is_one_finding_with_the_figures_of_the_first() -> None:
    reports = good()
    for rank, rate in ((0, 30.0), (2, 10.5)):
        put(reports, rank, "disk.write_mb_s", rate)
    (finding,) = judged(reports).findings
    assert finding.text.startswith("n1: 30 MB/s to the shared disk")
    assert finding.text.endswith("(also n2)")


def test_one_device_per_rank_is_as_good_as_all_of_them() -> None:
    reports = good()
    for one in reports:
        one["node"]["visible"] = 1
    assert judged(reports).findings == ()


def test_the_part_that_failed_first_comes_first_and_equal_failures_are_one() -> None:
    reports = good()
    for rank in (0, 1, 2):
        reports[rank]["problem"] = {"part": "all_reduce", "error": "closed by peer"}
    reports[3]["problem"] = {"part": "join", "error": "no route"}
    texts = [finding.text for finding in judged(reports).findings]
    assert texts[0].startswith("rank 3 on n2: join: no route")
    assert texts[1].startswith("ranks 0, 1, 2 on n1, n2: all_reduce")


def test_a_rank_that_died_is_named_and_not_those_that_lost_it() -> None:
    reports = good()
    reports[1]["doing"] = "all_reduce"
    for rank in (0, 2, 3):
        reports[rank]["problem"] = {"part": "all_reduce", "error": f"RuntimeError: Connection reset by peer {rank}"}
    (finding,) = judged(reports, ended="killed by signal 9").findings
    assert finding.text.startswith("rank 1 on n1 did not complete all_reduce (killed by signal 9)")
    reports[3]["problem"]["error"] = "ValueError: of its own"
    assert len(judged(reports).findings) == 2
    for report in reports:  # nobody died: then it is the network
        report.pop("doing", None)
    assert "ranks 0, 2 on n1, n2: all_reduce: RuntimeError: Connection reset" in judged(reports).findings[0].text


def test_a_thousand_ranks_do_not_fill_the_screen() -> None:
    one = report(0)
    reports = [{**one, "rank": n, "where": f"n{n // 8}", "ranks_on_node": 8} for n in range(1000)]
    for each in reports:
        each["problem"] = {"part": "join", "error": "no route " * 50}
    verdict = judge(reports, 125, 8, 0)
    assert len(verdict.line) < 300
    assert "and 992 more on n0, " in verdict.findings[0].text


PARTS = ("node", "disk", "join", "clock", "shared", "all_reduce", "step")


@given(st.integers(0, 3), st.sampled_from(PARTS))
def test_a_report_may_end_anywhere(rank: int, part: str) -> None:
    reports = copy.deepcopy(good())
    for name in PARTS[PARTS.index(part) :]:
        reports[rank].pop(name, None)
    reports[rank]["doing"] = part
    assert not judged(reports).ready


def test_reports_are_read_as_written_and_torn_ones_are_no_reports(tmp_path: Path) -> None:
    for one in good():
        report_of(tmp_path, one["rank"]).write_text(json.dumps(one))
    assert read_reports(tmp_path) == good()
    report_of(tmp_path, 2).write_text(json.dumps(report(2))[:-5])
    assert [one["rank"] for one in read_reports(tmp_path)] == [0, 1, 3]


# --- the trials of a disk, by four threads that meet as ranks do ---


def meet(world: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    barrier, values, results = threading.Barrier(world, timeout=30), [None] * world, [None] * world

    def rank(number: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[number] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        results[number] = work(number, gather)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def shared(folder: Path) -> Reports:
    """Good reports with what this disk really did in them."""
    found = meet(4, lambda rank, gather: disk.together(folder, rank, rank % 2 == 0, gather))
    return [{**one, "shared": facts} for one, facts in zip(good(), found, strict=True)]


def test_a_local_disk_passes(tmp_path: Path) -> None:
    reports = shared(tmp_path)
    verdict = judged(reports)
    assert verdict.ready, verdict.findings
    assert all("wrote after" in found.text for found in verdict.findings), "a busy machine may be slow, and no more"
    assert reports[0]["shared"]["winners"] == [1, 1]
    alone = disk.alone(tmp_path)
    assert alone["write_mb_s"] > 1
    assert abs(alone["clock_s"]) < 1


def test_a_disk_that_lets_two_make_one_file_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_exclusive", lambda file: file.touch() is None)  # O_EXCL ignored
    assert "2 nodes made one file" in judged(shared(tmp_path)).findings[0].text


def test_a_disk_that_keeps_old_content_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PATIENCE_S", 0.2)
    written = disk.write_text
    monkeypatch.setattr(disk, "write_text", lambda file, text: None if text == "after" else written(file, text))
    assert "does not see what rank 0 wrote" in judged(shared(tmp_path)).findings[0].text


def test_a_disk_without_locks_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: None)
    assert [report["shared"]["flock"] for report in shared(tmp_path)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--cluster", "local", "--nodes", "2"], "on this machine give --ranks"),
        (["--cluster", "local", "--ranks", "0"], "--ranks 0: give 1 or more"),
        (["--cluster", str(ROOT / "slurm/local.yaml"), "--ranks", "2"], "--ranks is for this machine"),
        (["--cluster", str(ROOT / "slurm/absent.yaml")], "absent.yaml"),
        (["--cluster", str(ROOT / "slurm/local.yaml")], "there is no sbatch on PATH"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path: Path, words: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llamagen_dist.cli", "check", *words, "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()
