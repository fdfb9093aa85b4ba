"""The training loop, the only one: it knows positions, logs, checkpoints and when to stop, but not what it trains."""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.console import Progress
from llamagen_dist.data import digest
from llamagen_dist.errors import Stopped, UserError
from llamagen_dist.process import peak_rss_gb
from llamagen_dist.tracking import evaluations
from llamagen_dist.tracking.log_line import FLOP_CONVENTION, LogWindow
from llamagen_dist.tracking.profile import StepProfiler
from llamagen_dist.training.garbage import ScheduledCollection
from llamagen_dist.training.guards import StopFlag
from llamagen_dist.training.out_of_memory import explained
from llamagen_dist.training.run import Run
from llamagen_dist.training.spikes import Spikes
from llamagen_dist.training.task import Stream, Task, TrainingConfig
from llamagen_dist.training.timing import Stopwatch
from llamagen_dist.training.watchdog import Watchdog


def _due(images_seen: int, batch: int, every: int, points: tuple[int, ...] = ()) -> bool:
    """Whether this step was the first to reach a multiple of ``every`` or one of ``points``."""
    before = images_seen - batch  # a batch may step over a multiple, so "is divisible" would miss it
    return (every > 0 and images_seen // every > before // every) or any(before < p <= images_seen for p in points)


def line_due(config: TrainingConfig, step: int, images_seen: int) -> bool:
    """Whether metrics.jsonl gets a line after this step, which the run has shown ``images_seen`` images with."""
    return step % config.log.every_steps == 0 or step == 1 or images_seen >= config.train.images


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    seen: digest of the samples shown so far (data/digest.py).
    seconds: spent on it by all starts together; None where a checkpoint of an older version does not say.
    """

    step: int = 0
    images_seen: int = 0
    seen: int = 0
    seconds: float | None = 0.0


def fit(task: Task, stream: Stream, config: TrainingConfig, run: Run) -> bool:
    """Train ``task`` to ``config.train.images`` images, from the newest good checkpoint of ``run`` on (collective).

    task: built and sharded; its weights are replaced where there is a checkpoint.
    stream: batches by position.
    config: the sections that all training runs share.
    run: the opened run directory.

    Returns whether a signal came during the very last step, for a caller that has another run to train. Raises Stopped
    after a signal, once everything is saved; UserError for other data, a full disk, or too little memory;
    NonFiniteError; LostRankError.
    """
    train, topology, guard, keep = config.train, task.topology, task.guard, config.checkpoint
    at = _resume(task, train.images, run)
    step, images_seen = at.step, at.images_seen
    if images_seen >= train.images and run.finished():
        run.say(f"{run.directory}: already finished")
        return False

    run.track(config.tracking)
    started, first_step, stopping = time.monotonic(), step, False
    log, limits, batch_size = run.directory / "log", config.guard, train.global_batch
    window = _window(task, config, at.seen)
    # from the log, so that a resumed run scores the next loss as the uninterrupted one would
    spikes = Spikes(limits.spike_window, limits.spike_score, run.logged("loss", limits.spike_window))
    saver = Saver(
        run.directory,
        topology,
        background=keep.background,
        keep_last=keep.keep_last,
        keep_every_images=keep.keep_every_images,
        in_use=lambda: evaluations.unscored(run.directory, config),
        fence=run.fence.check,
    )

    def seconds() -> float | None:
        return None if at.seconds is None else round(at.seconds + time.monotonic() - started, 2)

    def save() -> None:
        state = {
            "seconds": seconds(),
            **run.origin,
            "seed": train.seed,
            "layout": layout(task),
            "data": run.fingerprint,
            "samples": window.seen(),
            "skipped": guard.skipped,
            "task": dict(task.scalars()),
        }
        saver.save(step, images_seen, task.entries(), state, run.config_text, run.classes)

    def stopped() -> Stopped:
        return Stopped(
            f"{run.directory}: stopped at image {images_seen} of {train.images}; everything is saved, the same command "
            "resumes it"
        )

    bar = Progress(run.label, train.images) if topology.rank == 0 else nullcontext()
    hang_s, start_s = 60 * limits.hang_minutes, 60 * limits.start_minutes
    watchdog = Watchdog(log, topology, task.clock, hang_s, start_s, run.fence.lost)
    stopwatch = Stopwatch(log, run.say)
    profiler = StepProfiler(log, topology, config.log.profile_steps)
    collection = ScheduledCollection()
    with StopFlag(topology) as stop, saver, bar as progress, task.clock.collectives(), watchdog, profiler, collection:
        # the guard's all-reduce, one a step, carries the stop flag as well: no collective of its own for that
        guard.stop, guard.where = lambda: stop.up or saver.failed, stream.where
        if images_seen < train.images and stop.on_any_rank():  # while ranks waited for each other: all is on disk
            raise stopped()
        window.restart()
        while images_seen < train.images:
            with explained(task), profiler.step(step + 1), stopwatch.timing("step", counts=step > first_step):
                with task.clock.part("data"):
                    batch = stream.batch(images_seen)
                if step == first_step:  # compilation, and a lack of memory, are met before anything counts
                    with task.clock.part("compute"):
                        task.rehearse(batch, images_seen)
                    collection.freeze()
                    topology.barrier()  # a rank that rehearsed faster would count its wait for the others as a step's
                    window.restart()
                with task.clock.part("compute"):
                    metrics = task.step(batch, images_seen)
            step, images_seen = step + 1, images_seen + batch_size
            watchdog.beat(step)
            collection.step(step)
            window.count(batch.samples)
            if step == first_step + 1:  # ranks start and compile at different speeds; from here on they are in step
                topology.set_timeouts(60 * limits.collective_minutes)
            done, stopping = images_seen >= train.images, guard.stop_requested
            if line_due(config, step, images_seen):
                line = window.line(metrics)
                if guard.skipped:
                    line["skipped"] = guard.skipped
                spike = spikes.score(line["loss"]) if "loss" in line else None
                if spike is not None:
                    line["spike"] = round(spike, 2)
                    run.say(f"{run.label}: step {step}: the loss {line['loss']:.4f} is a spike: {spike:.1f} deviations")
                run.metrics(step=step, images_seen=images_seen, **line)
                stopwatch.saved(saver.committed_s)
                if progress:
                    loss = f"loss {line['loss']:.4f}, " if "loss" in line else ""
                    progress.set(images_seen, f"{loss}{line['images_per_s']:.0f} images/s")
            if done or _due(images_seen, batch_size, config.validation.every_images, config.validation.at_images):
                with watchdog.phase("validation"), stopwatch.timing("validation"):
                    scores = task.validate()
                    if topology.rank == 0:
                        run.pictures(step, task.pictures(config.tracking.pictures))
                        run.arrays(step, images_seen, task.arrays())
                    stopping = stop.on_any_rank(saver.failed)  # it may have taken long
                run.metrics(step=step, images_seen=images_seen, **scores)
                run.say(f"{run.label}: image {images_seen}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
                window.restart()
            # stopping: for a signal, or because a checkpoint cannot be written, and then save() raises the reason
            if done or stopping or _due(images_seen, batch_size, config.checkpoint.every_images):
                with watchdog.phase("save"):
                    save()
                    if done or stopping:
                        saver.wait()
                        stopwatch.saved(saver.committed_s)
                window.restart()
            if stopping and not done:
                raise stopped()
    peak = topology.max(torch.tensor(peak_rss_gb(), dtype=torch.float64))
    run.summary(
        images_seen=images_seen,
        step=step,
        **({} if (spent := seconds()) is None else {"seconds": spent}),
        peak_rss_gb=round(float(peak), 3),
        layout=layout(task),
        samples=window.seen(),
        skipped=guard.skipped,
        flop_convention=FLOP_CONVENTION,
        **task.describe(),
    )
    return stopping


def _resume(task: Task, images: int, run: Run) -> Position:
    """Put the newest good checkpoint back into the task; a run without one stands at its start."""
    checkpoint = run.newest  # as rank 0 sees the disk, so that no two ranks resume from different steps
    if checkpoint is None:
        run.cut_metrics(0)
        return Position()
    folder, state = checkpoint.folder, checkpoint.state
    if run.fingerprint is not None and state["data"] != run.fingerprint:
        raise UserError(
            f"{folder}: was trained on other data (fingerprint {state['data']}, now {run.fingerprint}); "
            "point data.train at the same shards, or choose another run_dir"
        )
    checkpoint.restore(task.entries())
    task.load_scalars(state["task"])
    task.guard.skipped = state["skipped"]
    step, images_seen = state["step"], state["images_seen"]
    run.say(f"resumed from {folder} at image {images_seen} of {images} (step {step})")
    before, now = state["layout"], layout(task)
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        run.say(f"another layout than that checkpoint's: {', '.join(changed)}")
    run.cut_metrics(images_seen)
    return Position(step, images_seen, digest.number(state["samples"]), state.get("seconds"))


def _window(task: Task, config: TrainingConfig, seen: int) -> LogWindow:
    known = task.describe()
    return LogWindow(
        task.topology,
        task.clock,
        config.train.global_batch,
        precision=known["precision"],
        tokens_per_image=known.get("tokens_per_image"),
        flops_per_image=known.get("training_flops_per_image"),
        seen=seen,
    )


def layout(task: Task) -> dict[str, int]:
    t = task.topology
    return {"ranks": t.world, "tensor": t.tensor, "data": t.dp, "zero": task.zero}
