"""How a job's end is judged by its batch script: done, failed for good, or once more. A pure function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llamagen_dist.launch.folder import Limits
from llamagen_dist.launch.rank import CRASHED, DONE, INTERRUPTED, STOPPED, USER_ERROR

HOPELESS = ("NonFiniteError",)  # the same positions give the same numbers: it would only happen again
BY_SIGNAL = (130, 128 + 15, 128 + 12)  # exit codes of a rank that was told to stop before it listened


@dataclass(frozen=True)
class Verdict:
    """What follows. fault: it counts against ``max_faults``. reason: one line for people."""

    action: Literal["done", "failed", "requeue"]
    outcome: str
    reason: str = ""
    fault: bool = False


def decide(
    rc: int, reports: Sequence[Mapping[str, Any]], limits: Limits, events: Sequence[Mapping[str, Any]], steps: float
) -> Verdict:
    """rc: srun's exit status. reports: of the ranks of this incarnation. events: history of this submission.
    steps: how far the run is on disk."""
    verdict = _end(rc, reports)
    if verdict.action != "requeue":
        return verdict
    if not limits.requeue:
        return Verdict("failed", verdict.outcome, f"{verdict.reason}; requeue is off in the cluster profile")
    requeues = [event for event in events if event["event"] == "requeued"]
    faults = sum(bool(event.get("fault")) for event in requeues)
    if verdict.fault and faults >= limits.max_faults:
        return Verdict("failed", verdict.outcome, f"{faults} restarts after faults used up; the last: {verdict.reason}")
    stuck = 0
    for event in reversed(requeues):
        if event["steps"] < steps:
            break
        stuck += 1
    if stuck >= limits.max_stuck:
        return Verdict("failed", verdict.outcome, f"no progress in {stuck} restarts; the last: {verdict.reason}")
    return verdict


def _end(rc: int, reports: Sequence[Mapping[str, Any]]) -> Verdict:
    def of(*outcomes: str) -> list[Mapping[str, Any]]:
        matching = [report for report in reports if report.get("outcome") in outcomes]
        return sorted(matching, key=lambda report: report["ended"])

    refused = of(USER_ERROR)
    if refused:
        return Verdict("failed", USER_ERROR, _line(refused[0], whole=True))
    crashed = of(CRASHED)
    hopeless = [report for report in crashed if report.get("error") in HOPELESS]
    if hopeless:
        return Verdict("failed", CRASHED, _line(hopeless[0]))
    first = next((report for report in reports if report["rank"] == 0), None)
    if rc == 0 and first is not None and first.get("outcome") == DONE:
        return Verdict("done", DONE)
    if rc == 0 and of(STOPPED):
        return Verdict("requeue", STOPPED, "told to stop, everything is saved")
    if rc in BY_SIGNAL and not crashed:
        return Verdict("requeue", INTERRUPTED, "told to stop before it had begun to train")
    if crashed:
        return Verdict("requeue", CRASHED, _line(crashed[0]), fault=True)
    sentence = next((report["sentence"] for report in reports if report.get("sentence")), "")
    if sentence:
        return Verdict("requeue", CRASHED, str(sentence).splitlines()[0], fault=True)
    if rc == 0:  # as srun ends when SLURM has lost a node of the job
        return Verdict("requeue", CRASHED, "srun ended before its ranks: SLURM has lost a node", fault=True)
    how = f"killed by signal {rc - 128}" if rc > 128 else f"exit code {rc}"
    return Verdict("requeue", CRASHED, f"a rank died without a message ({how})", fault=True)


def _line(report: Mapping[str, Any], whole: bool = False) -> str:
    lines = [line for line in str(report.get("message", "")).splitlines() if line.strip()] or ["no message"]
    return f"rank {report['rank']}: {lines[0] if whole else lines[-1]}"
