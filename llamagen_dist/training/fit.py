"""The training loop, the only one: it knows positions, logs, checkpoints and when to stop, but not what it trains."""

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from llamagen_dist.checkpoint import store
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.config import GPTConfigFile, TokenizerConfigFile, UserError
from llamagen_dist.launch.entry import Stopped
from llamagen_dist.tracking.progress import Progress
from llamagen_dist.training.guards import StopFlag
from llamagen_dist.training.run import Run
from llamagen_dist.training.task import Stream, Task


def peak_rss_gb() -> float:
    """Largest resident memory this process ever had, in 10^9 bytes (Linux counts KiB, macOS bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _due(images_seen: int, batch: int, every: int, points: tuple[int, ...] = ()) -> bool:
    """Whether this step was the first to reach a multiple of ``every`` or one of ``points``."""
    before = images_seen - batch
    return (every > 0 and images_seen // every > before // every) or any(before < p <= images_seen for p in points)


def fit(task: Task, stream: Stream, config: GPTConfigFile | TokenizerConfigFile, run: Run) -> bool:
    """Train ``task`` to ``config.train.images`` images, resuming from the newest good checkpoint of ``run``.

    All ranks call it. Raises Stopped after a signal, once everything is saved; the same command then goes on. Returns
    whether a signal came during the very last step, for a caller that would have gone on with another run.
    """
    train, topology = config.train, task.topology
    step = images_seen = 0
    # rank 0 looks and verifies; the others take its word, so that no two ranks resume from different steps
    folder = topology.agreed(lambda: store.newest(run.directory))
    if folder is not None:
        state = store.read_state(folder)
        if run.fingerprint is not None and state["data"] != run.fingerprint:
            raise UserError(
                f"{folder}: was trained on other data (fingerprint {state['data']}, now {run.fingerprint}); "
                "point data.train at the same shards, or choose another run_dir"
            )
        store.restore(folder, task.entries())
        task.load_scalars(state["task"])
        step, images_seen = state["step"], state["images_seen"]
        run.say(f"resumed from {folder} at image {images_seen} of {train.images} (step {step})")
    run.cut_metrics(images_seen)
    if images_seen >= train.images and run.finished():
        run.say(f"{run.directory}: already finished")
        return False

    started = time.monotonic()
    asked = False

    keep = config.checkpoint
    saver = Saver(
        run.directory,
        topology,
        background=keep.background,
        keep_last=keep.keep_last,
        keep_every_images=keep.keep_every_images,
    )

    def save() -> None:
        state = {
            **run.origin,
            "seed": train.seed,
            "layout": layout(task),
            "data": run.fingerprint,
            "task": dict(task.scalars()),
        }
        saver.save(step, images_seen, task.entries(), state, run.config_text, run.classes)

    bar = Progress(run.label, train.images) if topology.rank == 0 else nullcontext()
    with StopFlag(topology) as stop, saver, bar as progress, task.clock.collectives():
        window_start, window_images = time.monotonic(), 0
        while images_seen < train.images:
            with task.clock.part("data"):
                batch = stream.batch(images_seen)
            with task.clock.part("compute"):
                metrics = task.step(batch, images_seen)
            step, images_seen = step + 1, images_seen + train.global_batch
            window_images += train.global_batch
            done = images_seen >= train.images
            if step % config.log.every_steps == 0 or step == 1 or done:
                averaged = _average(metrics, task)
                speed = window_images / max(time.monotonic() - window_start, 1e-9)
                run.metrics(step=step, images_seen=images_seen, **averaged, images_per_s=round(speed, 2))
                if progress:
                    progress.set(images_seen, f"loss {averaged['loss']:.4f}, {speed:.0f} images/s")
                window_start, window_images = time.monotonic(), 0
            if done or _due(
                images_seen, train.global_batch, config.validation.every_images, config.validation.at_images
            ):
                held_out = task.validate()
                run.metrics(step=step, images_seen=images_seen, **held_out)
                run.say(f"{run.label}: image {images_seen}: " + ", ".join(f"{k} {v:.4f}" for k, v in held_out.items()))
                window_start, window_images = time.monotonic(), 0
            asked = stop.agreed(saver.failed)  # a checkpoint that cannot be written stops the run: save() says why
            if done or asked or _due(images_seen, train.global_batch, config.checkpoint.every_images):
                save()
                if done or asked:
                    saver.wait()
                window_start, window_images = time.monotonic(), 0
            if asked and not done:
                raise Stopped(
                    f"{run.directory}: stopped at image {images_seen} of {train.images}; everything is saved, the "
                    "same command goes on from here"
                )
    peak = torch.tensor(peak_rss_gb(), dtype=torch.float64)
    if topology.world > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    run.summary(
        images_seen=images_seen,
        step=step,
        seconds=round(time.monotonic() - started, 2),
        peak_rss_gb=round(float(peak), 3),
        layout=layout(task),
        **task.describe(),
    )
    return asked


def layout(task: Task) -> dict[str, int]:
    t = task.topology
    return {"ranks": t.world, "tensor": t.tensor, "data": t.dp, "zero": task.zero}


def _average(metrics: Mapping[str, Tensor], task: Task) -> dict[str, float]:
    names = sorted(metrics)
    values = task.topology.mean(torch.stack([metrics[n].detach().double().cpu() for n in names]))
    return dict(zip(names, values.tolist(), strict=True))
