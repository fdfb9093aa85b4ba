"""Runs faults, several at once, and judges each against the uninterrupted run of its program."""

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from llamagen_dist.checkpoint.folder import complete
from tests.slurm.faults import checks
from tests.slurm.faults.injections import ELASTIC, Fault, SmallDisk
from tests.slurm.faults.programs import PROGRAMS, STEPS, Program, paced_checkout
from tests.slurm.faults.trial import Trial, slurm

DISK_CHECKPOINTS = 4.5  # checkpoints that the small disk holds


@dataclass(frozen=True)
class Result:
    fault: Fault
    program: str
    problems: tuple[str, ...]
    redone: int
    """Steps done twice, over all restarts."""
    restarts: int
    seconds: float | None
    """From the fault to the first new step."""
    told_s: float | None
    """From the fault to the batch script's requeue."""
    remarks: str = ""

    @property
    def passed(self) -> bool:
        return not self.problems


class Campaign:
    """The runs of one call in ``folder``. at_once: how many at a time (each has two nodes of its own)."""

    def __init__(self, folder: Path, programs: Sequence[str], at_once: int, say: Callable[[str], None] = print) -> None:
        self._folder, self._say = folder, say
        self._checkout = paced_checkout(folder / "checkout")
        self._configs = {name: PROGRAMS[name].write_config(folder / "data") for name in programs}
        self._pool, self._alone = ThreadPoolExecutor(at_once), Lock()
        self._whole: dict[str, Future[Trial]] = {
            name: self._pool.submit(self._uninterrupted, name) for name in programs
        }

    def trial(self, program: Program, name: str, **more: object) -> Trial:
        return Trial(program, self._configs[program.name], self._checkout, self._folder / program.name / name, **more)  # type: ignore[arg-type]

    def _uninterrupted(self, name: str) -> Trial:
        trial = self.trial(PROGRAMS[name], "uninterrupted", profile={"sbatch": {"exclude": ELASTIC}}, pace_s=0.0)
        trial.launch()
        end = trial.finish()
        assert end == "done", end
        assert [step.number for step in trial.steps()] == list(range(1, STEPS + 1))
        self._say(f"{name}: uninterrupted in {trial.steps()[-1].time - trial.events('submitted')[0]['time']:.0f} s")
        return trial

    def run(self, cases: Sequence[tuple[Fault, str]]) -> list[Result]:
        """All of them, in the order given; blocks."""
        futures = [self._pool.submit(self._case, fault, program) for fault, program in cases]
        return [future.result() for future in futures]

    def _case(self, fault: Fault, name: str) -> Result:
        profile = {"sbatch": {"exclude": ELASTIC}, **fault.profile}
        trial = self.trial(PROGRAMS[name], f"fault-{fault.number}", profile=profile, pace_s=fault.pace_s)
        problems: list[str] = []
        began = time.time()
        with ExitStack() as stack:
            if fault.alone:
                stack.enter_context(self._alone)
            try:
                if fault.small_disk:
                    stack.enter_context(self._small_disk(trial))
                if fault.launches:
                    trial.launch()
                fault.inject(trial)
                end = trial.finish()
                problems = [f"it failed: {end}"] if end != "done" else judge(trial, fault, self._whole[name].result())
            except Exception as error:
                problems = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"]
                (trial.folder.with_name(trial.folder.name + "-error.txt")).write_text(traceback.format_exc())
                if trial.events("submitted"):
                    slurm("scancel", "--quiet", *{str(event["job"]) for event in trial.events("submitted")})
        result = _result(fault, name, trial, problems)
        said = "ok" if result.passed else "; ".join(problems)
        self._say(f"{name}: {fault.number} {fault.name}: {said} ({time.time() - began:.0f} s)")
        return result

    def _small_disk(self, trial: Trial) -> SmallDisk:
        newest = complete(self._whole[trial.program.name].result().folder)[-1]
        size = sum(file.stat().st_size for file in newest.iterdir())
        return SmallDisk(trial.folder / "checkpoints", int(DISK_CHECKPOINTS * size))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def judge(trial: Trial, fault: Fault, whole: Trial) -> list[str]:
    """Everything that is wrong with a run after its fault."""
    lines = trial.metrics()
    return [
        *checks.same_lines(lines, whole.metrics(), fault.tolerance),
        *checks.same_weights(trial.folder, whole.folder, fault.tolerance),
        *checks.right_samples(lines, trial.program.digest),
        *checks.redone_too_many(trial.steps(), fault.most),
        *checks.leftovers(trial.folder),
    ]


def _result(fault: Fault, name: str, trial: Trial, problems: list[str]) -> Result:
    redone, steps = checks.steps_redone(trial.steps()), trial.steps()
    seconds = told = None
    if trial.fault_at is not None and redone:
        at = trial.fault_at
        before = [step.owner for step in steps if step.time <= at + 0.001]
        seconds = next((s.time - at for s in steps if s.time > at and before and s.owner != before[-1]), None)
        told = next((e["time"] - at for e in trial.events("requeued") if e["time"] > at), None)
    return Result(fault, name, tuple(problems), sum(redone), len(redone), seconds, told, trial.remarks)


def cases(only: Sequence[int] | None, programs: Sequence[str], faults: Sequence[Fault]) -> list[tuple[Fault, str]]:
    """Those that last longest first, and those that wait for each other apart."""
    chosen = [(fault, name) for fault in faults for name in programs if only is None or fault.number in only]
    early = {
        (10, "gpt"): 0,
        (1, "gpt"): 1,
        (1, "tokenizer"): 1,
        (7, "gpt"): 2,
        (7, "tokenizer"): 2,
        (10, "tokenizer"): 3,
    }
    return sorted(chosen, key=lambda case: (early.get((case[0].number, case[1]), 4), case[0].number))


__all__ = ["Campaign", "Result", "cases", "judge"]
