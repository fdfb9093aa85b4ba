"""``llamagen launch … --cluster FILE``: submit, attach to what runs already, or go on with what has ended."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llamagen_dist.config import ClusterConfig, Section, dump
from llamagen_dist.config.resume import same_config
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import not_anothers, own_folder, write_text
from llamagen_dist.launch import snapshot
from llamagen_dist.launch.pipeline import command, program_exists, take_code
from llamagen_dist.launch.single import folder_of
from llamagen_dist.launch.slurm import elastic, lock, queue, standby
from llamagen_dist.launch.slurm.records import Place, Work, outcome_of, read_json
from llamagen_dist.launch.slurm.submission import Size, check_path, limits_of, masked, script, size_of, submit
from llamagen_dist.launch.stages import absolute
from llamagen_dist.parallel.division import check_ranks
from llamagen_dist.training import timing

POLL_S = 2.0
ENDING_PATIENCE_S = 120.0  # for a job that is just ending, or a launch that is just submitting


@dataclass(frozen=True)
class Found:
    """What goes on in a folder. job: the one that runs, waits, or ran last."""

    kind: Literal["free", "submitting", "running", "finished", "failed", "stopped"]
    job: str | None = None
    state: queue.JobState | None = None
    held: lock.Lock | None = None
    reason: str = ""


def find(folder: Path, jobs: dict[str, queue.JobState] | None = None) -> Found:
    """jobs: ``queue.mine()`` where it was asked already. Raises queue.SilentError where SLURM does not answer."""
    place = Place.of(folder)
    held = lock.read(place)
    if held is None:
        return Found("free")
    jobs = queue.mine() if jobs is None else jobs
    # by the comment too: a launch that died after sbatch has written down no id
    ours = [j for j in jobs.values() if j.job in held.jobs or (j.comment == held.token and not held.jobs)]
    idle = elastic.left_over(place, held, jobs)
    alive = sorted((j for j in ours if j.alive and j.job not in idle), key=lambda j: (j.state != "RUNNING", j.job))
    if alive:
        return Found("running", alive[0].job, alive[0], held)
    if not held.jobs and not ours and lock.age(place) < lock.SUBMITTING_S:
        return Found("submitting", None, None, held)
    job = held.jobs[0] if held.jobs else None
    if outcome_of(place.events()) == "done":
        return Found("finished", job, None, held)
    end = read_json(place.end)
    if end is not None:
        return Found("failed", job, None, held, str(end["reason"]))
    return Found("stopped", job, next((j for j in ours), None), held)


def nothing_runs(folders: Sequence[Path]) -> None:
    """Before a launch on this machine: raises UserError where a cluster's job runs or waits in one of the folders."""
    held = [folder for folder in folders if Place.of(folder).lock.exists()]
    if not held:
        return
    try:
        jobs = queue.mine()
    except UserError as error:
        raise UserError(
            f"{held[0]} was launched on a cluster, and whether its job still runs cannot be asked ({error}); if it "
            f"does not, delete {Place.of(held[0]).lock}"
        ) from None
    for folder in held:
        found = find(folder, jobs)
        if found.kind in ("running", "submitting"):
            raise UserError(f"{folder}: job {found.job or '(just submitted)'} runs there; wait for it, or scancel it")


def launch(
    module: str,
    config: Section,
    profile: ClusterConfig,
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    dry_run: bool = False,
    follow: bool = False,
) -> None:
    """One program as one job in the config's run directory.

    The same again attaches to the job that runs or waits; where none does, the run goes on from its last checkpoint.
    Raises UserError; SystemExit(1) from --follow when the run has failed.
    """
    program_exists(module, snapshot.code_root())
    config = absolute(config)
    folder = folder_of(config)
    not_anothers(folder)
    check_path(folder)
    size = size_of(profile, nodes, gpus_per_node)
    fits(config, size.ranks)
    smaller = standby.sizes(profile, size)
    for less in smaller:
        try:
            fits(config, less.ranks)
        except UserError as error:
            raise UserError(f"elastic.nodes: {less.nodes}: {error}") from None
    if smaller:
        config = standby.fixed_micro_batch(config, size.ranks)
    for line in same_config(folder, config):
        print(line)
    arguments = (str(folder / "launch/config.yaml"),)
    work = Work(
        name=folder.name,
        module=module,
        arguments=arguments,
        folder=str(folder),
        code=str(folder / "code/SNAPSHOT"),
        ranks_per_node=size.ranks_per_node,
        limits=limits_of(profile),
    )
    if dry_run:
        print(masked(script([work], profile, size)), end="")
        for number, less in enumerate(smaller, start=1):
            print(f"# and the same with --nodes={less.nodes} --begin={standby.begins_after(profile, number)}")
        return
    queue.need()
    screen = Screen()
    if late := timing.warning(folder, profile.signal_delay_s):
        screen.say(late)
    found = settled(folder, screen)
    if found.kind == "finished":
        screen.say(f"{folder}: finished (job {found.job})")
        return
    if found.kind == "running":
        assert found.state is not None
        screen.say(f"{folder}: job {found.job} is {found.state.state.lower()} already; attached")
    else:
        if found.kind == "failed":
            screen.say(f"{folder}: job {found.job} failed ({found.reason}); going on from the last checkpoint")
        elif found.kind == "stopped":
            how = f"job {found.job}" if found.job else "an earlier launch"
            how += f" ended as {found.state.state}" if found.state else " is over"
            screen.say(f"{folder}: {how}; going on from the last checkpoint")
        if found.held is not None:
            elastic.cancel_left_over(Place.of(folder), found.held)
        own_folder(folder)
        (folder / "launch").mkdir(mode=0o700, exist_ok=True)
        code = take_code(folder, screen)
        write_text(folder / "launch/config.yaml", dump(config))
        work = replace(work, code=str(code))
        try:
            (job,) = submit([work], profile, size, stale=[found.held])
        except lock.TakenError:
            found = settled(folder, screen)
            if found.kind != "running":
                raise UserError(f"{folder}: another launch came between; try again") from None
            screen.say(f"{folder}: another launch was quicker; attached to its job {found.job}")
        else:
            screen.say(f"{folder}: job {job}, {size.ranks} ranks on {size.nodes} node{'s' * (size.nodes > 1)}")
            held = lock.read(Place.of(folder))
            if smaller and held is not None:
                work = replace(work, token=held.token)
                standby.submit_all(work, profile, smaller, job, held.token, screen.say)
    screen.say(f"logs: {folder / 'log'}; state: llamagen status {folder}")
    if follow:
        raise SystemExit(watch(folder, screen))


def settled(folder: Path, screen: Screen) -> Found:
    """What goes on in the folder, once a job that is just ending has ended and a launch has submitted."""
    deadline, told = time.monotonic() + ENDING_PATIENCE_S, False
    while True:
        found = find(folder)
        ending = found.state is not None and found.kind == "running" and found.state.state == "COMPLETING"
        if found.kind != "submitting" and not ending:
            return found
        if time.monotonic() > deadline:
            what = f"job {found.job} is still ending" if ending else "another launch is submitting"
            raise UserError(f"{folder}: {what} for {ENDING_PATIENCE_S:.0f} s; try again later")
        if not told:
            screen.say(f"{folder}: {'waiting for job ' + str(found.job) if ending else 'waiting for another launch'}")
            told = True
        time.sleep(0.5)


def fits(config: Section, ranks: int) -> None:
    """Refuse before the queue what the ranks would refuse after it. Raises UserError."""
    check_ranks(config, ranks)


def watch(folder: Path, screen: Screen) -> int:
    """Follow the run to its end, through requeues. Returns the exit code: 0 when it is done. Ctrl-C only stops
    following."""
    place, seen = Place.of(folder), len(Place.of(folder).events())
    asked = 0.0
    with screen.follow(place.progress) as tick:
        try:
            while True:
                events = place.events()
                for event in events[seen:]:
                    screen.say(describe(event))
                seen = len(events)
                if events and events[-1]["event"] in ("done", "failed"):
                    return 0 if events[-1]["event"] == "done" else 1
                if time.monotonic() - asked > 15:
                    asked, found = time.monotonic(), find(folder)
                    if found.kind not in ("running", "submitting") and len(place.events()) == seen:
                        screen.say(f"{folder}: no job runs or waits any more; the same command goes on")
                        return 1
                tick()
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            screen.say(f"the job goes on; follow it again with:\n  {command()}")
            sys.exit(130)


def describe(event: dict[str, Any]) -> str:
    """One event of history.jsonl for people."""
    when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    steps = f" at step {event['steps']:.0f}" if "steps" in event else ""
    more = ", ".join(str(event[key]) for key in ("reason", "why", "to") if event.get(key))
    what = event["event"].replace("_", " ")
    return f"{when} job {event.get('job')} {what}{steps}{': ' if more else ''}{more}"


__all__ = ["Found", "Size", "find", "launch", "watch"]
