"""PROGRAM: what a checkpoint costs training.

    OMP_NUM_THREADS=1 python -m tests.bench.save [--megabytes 512] [--ranks 1 2] [--repeats 7] [--folder DIR]

Blocked time of a background save against one memcpy of the same bytes and against a plain torch.save, interleaved;
steps done beside a throttled writer; peak memory of foreground saves and of a restore at three sizes. Nothing is
asserted: the machine decides the figures, the ratios are what to look at.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llamagen_dist.checkpoint import plan
from llamagen_dist.checkpoint.saver import Saver
from llamagen_dist.parallel.entries import TensorEntry, replicated
from llamagen_dist.parallel.topology import start
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.ranks.layouts import Layout, make_task
from tests.ranks.pacing import paced

DIM, MIB = 768, 1 << 20


def state(megabytes: int) -> list[TensorEntry]:
    """Weights and two moments of blocks as in GPT-B, until they are as large as asked; each tensor lies apart."""
    shapes = [(3 * DIM, DIM), (DIM, DIM), (2048, DIM), (2048, DIM), (DIM, 2048), (DIM,), (DIM,)]
    found: list[TensorEntry] = []
    held = layer = 0
    while held < megabytes * MIB:
        for number, shape in enumerate(shapes):
            for group, kind in (("weights", ""), ("optimizer", "exp_avg/"), ("optimizer", "exp_avg_sq/")):
                tensor = torch.full(shape, float(layer + number))
                found.append(replicated(group, f"{kind}layers.{layer}.{number}", tensor))
                held += tensor.nbytes
        layer += 1
    return found


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def spent(since: tuple[float, float]) -> np.ndarray:
    """(wall seconds, CPU seconds)"""
    return np.subtract(clock(), since)


def blocked(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    topology = start()
    entries = state(megabytes)
    mine = [e for e, o in zip(entries, plan.deal(entries, topology.world), strict=True) if o == topology.rank]
    share = sum(plan.size_of(entry) for entry in mine)
    source, target = np.ones(share, np.uint8), np.zeros(share, np.uint8)
    topology.barrier()
    since = clock()
    fresh = np.empty(share, np.uint8)
    np.copyto(fresh, source)
    first_copy = spent(since)
    del fresh
    saver = Saver(folder / "run", topology, keep_last=1)
    copies, saves, plain = [], [], []
    for number in range(repeats + 1):
        topology.barrier()
        since = clock()
        np.copyto(target, source)
        copies.append(spent(since))
        topology.barrier()
        since = clock()
        saver.save(number, number, entries, {}, "kind: gpt\n")
        saves.append(spent(since))
        saver.wait()
        topology.barrier()
        if topology.rank == 0 and number:
            since = clock()
            with open(folder / "plain.pt", "wb") as file:
                torch.save({f"{e.group}:{e.key}": e.read(0) for e in entries}, file)
                os.fsync(file.fileno())
            plain.append(spent(since))
    return {
        "share": share,
        "first copy": first_copy,
        "first save": saves[0],
        "copies": copies[1:],
        "saves": saves[1:],
        "plain": plain,
        "held": saver._buffer.size,
    }


def engine_blocked(folder: Path, layout: Layout, repeats: int) -> dict[str, Any]:
    """A real engine, whose state has to be gathered from where the layout keeps it."""
    topology = start(layout.tensor)
    task = make_task(layout, "model.n_layer=6", "model.dim=512", "model.n_head=8")
    entries = task.entries()
    size = sum(plan.size_of(entry) for entry in entries)
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    saver = Saver(folder / "run", topology, keep_last=1)
    copies, saves = [], []
    for number in range(repeats + 1):
        topology.barrier()
        if topology.rank == 0:
            since = clock()
            np.copyto(target, source)
            copies.append(spent(since))
        topology.barrier()
        since = clock()
        saver.save(number, number, entries, {}, "kind: gpt\n")
        saves.append(spent(since))
        saver.wait()
    return {"size": size, "copies": copies[1:], "saves": saves[1:]}


def steps_beside(folder: Path, megabytes: int, slow_s: float) -> dict[str, Any]:
    topology = start()
    entries = state(megabytes)
    a = torch.randn(256, 256)

    def steps(seconds: float, until: Path | None) -> int:
        end, done, go_on = time.monotonic() + seconds, 0, True
        while go_on:
            for _ in range(20):
                a.mm(a)
            done += 1
            topology.mean(a[0])
            over = until.exists() if until is not None else time.monotonic() > end
            go_on = not topology.any_rank(over)
        return done

    blocks = megabytes * MIB / topology.world / (8 * MIB)
    saver = Saver(folder / "run", topology)
    steps(0.2, None)
    began = time.monotonic()
    with paced(lambda written: time.sleep(slow_s / blocks)):
        path = saver.save(1, 1, entries, {}, "kind: gpt\n")
        beside = steps(0, path / "COMPLETE")
        took = time.monotonic() - began
        saver.wait()
    return {"beside": beside, "seconds": took, "alone": steps(took, None)}


def peak(work: Any) -> int:
    """Bytes by which this process' resident memory rose at most while ``work`` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peaks(folder: Path, megabytes: int, how: str) -> float:
    """MiB on the rank that needed most."""
    topology = start()
    entries = state(megabytes)
    run = folder / "run"

    def foreground() -> None:
        Saver(run, topology, background=False).save(1, 1, entries, {}, "kind: gpt\n")

    def background() -> None:
        saver = Saver(run, topology)
        saver.save(1, 1, entries, {}, "kind: gpt\n")
        saver.wait()

    def restore() -> None:
        store.restore(run / "checkpoints" / "step_00000001", entries)

    def gathered() -> None:
        whole = {f"{e.group}:{e.key}": e.read(0).clone() for e in entries} if topology.rank == 0 else {}
        torch.save(whole, folder / "plain.pt")

    if how == "restore":
        foreground()
        topology.barrier()
    work = {"foreground": foreground, "background": background, "restore": restore, "gathered": gathered}[how]
    most = torch.tensor(peak(work) / MIB)
    if topology.world > 1:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def median(pairs: list[np.ndarray], column: int) -> float:
    return statistics.median(float(pair[column]) for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    options = parser.parse_args()
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            print_blocked(ranks, run_ranks(blocked, ranks, Path(scratch), options.megabytes, options.repeats))
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            found = run_ranks(steps_beside, ranks, Path(scratch), options.megabytes // 4, 2.0)[0]
        print(
            f"  throttled writer ({found['seconds']:.1f} s for {options.megabytes // 4} MiB): {found['beside']} steps "
            f"beside it, {found['alone']} without = {found['beside'] / found['alone']:.2f}"
        )
        print_peaks(ranks, options)
    if 2 in options.ranks:
        print_engines(options)


def print_engines(options: argparse.Namespace) -> None:
    print("\n2 ranks, a GPT of 6 layers of 512: blocked against one memcpy of the whole state on one rank")
    print(f"  {'':34}{'wall s':>9}{'CPU s':>9}{'/ memcpy (wall, CPU)':>23}")
    for layout in (
        Layout(2, 1, 0),
        Layout(2, 1, 1),
        Layout(2, 1, 2),
        Layout(2, 1, 3),
        Layout(2, 2, 0),
        Layout(2, 2, 1),
    ):
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            results = run_ranks(engine_blocked, 2, Path(scratch), layout, options.repeats)
        slowest = max(results, key=lambda r: median(r["saves"], 0))
        wall, cpu = (median(slowest["saves"], column) for column in (0, 1))
        ratios = wall / median(results[0]["copies"], 0), cpu / median(results[0]["copies"], 1)
        name = f"tensor {layout.tensor}, ZeRO-{layout.zero} ({slowest['size'] / MIB:.0f} MiB)"
        print(f"  {name:34}{wall:9.4f}{cpu:9.4f}{ratios[0]:14.2f}{ratios[1]:9.2f}")


def print_blocked(ranks: int, results: list[dict[str, Any]]) -> None:
    print(f"\n{ranks} rank(s), {sum(r['share'] for r in results) / MIB:.0f} MiB of state, slowest rank, medians")
    print(f"  {'':34}{'wall s':>9}{'CPU s':>9}{'GB/s':>8}")
    slowest = max(results, key=lambda r: median(r["saves"], 0))
    share = slowest["share"]
    for name, pairs in (
        ("one memcpy of the rank's share", slowest["copies"]),
        ("background save: training blocked", slowest["saves"]),
        ("plain torch.save (rank 0, all)", results[0]["plain"]),
        ("first memcpy (fresh memory)", [slowest["first copy"]]),
        ("first background save", [slowest["first save"]]),
    ):
        speed = share / median(pairs, 0) / 1e9
        print(f"  {name:34}{median(pairs, 0):9.4f}{median(pairs, 1):9.4f}{speed:8.2f}")
    ratios = [s / c for s, c in zip(slowest["saves"], slowest["copies"], strict=True)]
    first = slowest["first save"] / slowest["first copy"]
    print(
        f"  blocked / memcpy: {median(ratios, 0):.2f} wall, {median(ratios, 1):.2f} CPU (goal <= 2); first save "
        f"{first[0]:.2f}; torch.save / blocked: {median(results[0]['plain'], 0) / median(slowest['saves'], 0):.1f}"
    )
    print(f"  host memory kept for it: {slowest['held'] / share:.2f} x the rank's share")


def print_peaks(ranks: int, options: argparse.Namespace) -> None:
    shard = 64
    sizes = [options.megabytes // 4, options.megabytes // 2, options.megabytes]
    print(f"  peak extra memory, MiB (files of {shard} MiB)" + "".join(f"{f'{size} MiB':>10}" for size in sizes))
    for how in ("foreground", "background", "restore", "gathered"):
        row = []
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                plan.SHARD_BYTES = shard * MIB
                row.append(run_ranks(peaks, ranks, Path(scratch), size, how)[0])
        what = {"gathered": "copy of all on rank 0, torch.save"}.get(how, how)
        print(f"    {what:42}" + "".join(f"{value:10.0f}" for value in row))
    plan.SHARD_BYTES = 1 << 30


if __name__ == "__main__":
    main()
