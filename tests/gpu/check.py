"""``make gpu-check``: everything that only a GPU can tell, in one table to paste.

    python -m tests.gpu.check [--device cuda|cpu] [--small]

Parity with the reference's numbers, eager against compiled, speed, MFU, memory against ``llamagen plan``'s figure, and
all GPUs of the machine together. Exit code 0: all passed; 1: something failed; 2: there is no GPU. ``--device cpu
--small`` runs the same program at a tiny size, so that the tests keep it alive.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.gpu import table
from tests.gpu.table import Row, below

ROOT = Path(__file__).parent.parent.parent
FREE = 1.15
"""Allocated memory may be so many times the plan's: kernels' workspaces are not in the plan, which keeps 10 % free."""
TINY = {"model": {"n_layer": 2, "n_head": 4, "dim": 64}, "tokens": 16, "vocabulary": 256, "steps": 3}


def size(name: str, micro: int, **more: Any) -> dict[str, Any]:
    return {
        "model": {"size": name},
        "tokens": 256,
        "vocabulary": 16384,
        "precision": "bf16",
        "zero": 1,
        "micro": micro,
        "steps": 8,
        **more,
    }


def cases(small: bool, compiled: bool) -> list[dict[str, Any]]:
    """What one GPU is measured on. The first is the yardstick of what follows under the same model."""
    if small:
        tiny = {**TINY, "precision": "bf16", "zero": 1, "micro": 2}
        return [tiny, {**tiny, "micro": 4}, *([{**tiny, "compile": True}] if compiled else [])]
    found = []
    for name, micros in (("GPT-B", (8, 32, 64)), ("GPT-L", (8, 32))):
        found += [size(name, micro) for micro in micros]
        found.append(size(name, 32, compile=True))
    found.append(size("GPT-B", 32, precision="fp32", zero=0))
    found.append(size("GPT-B", 32, precision="fp32", zero=0, compile=True))
    return found


def train(cases: Sequence[dict[str, Any]], device: str, ranks: int) -> list[dict[str, Any]]:
    """Run tests.gpu.speed in a process of its own (so that nothing else holds memory), on so many ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted, out = Path(scratch) / "cases.json", Path(scratch) / "found.json"
        wanted.write_text(json.dumps(list(cases)))
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *many, "-m", "tests.gpu.speed", str(out), str(wanted)]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        where = {**os.environ, **hidden}
        done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        return list(json.loads(out.read_text()))


def name_of(case: dict[str, Any]) -> str:
    model = case["model"]
    return str(model.get("size") or f"{model['n_layer']} layers of {model['dim']}")


def describe(case: dict[str, Any]) -> str:
    words = [f"micro-batch {case['micro']}", f"ZeRO-{case['zero']}", *(["compiled"] if case.get("compile") else [])]
    return f"{case['precision']}, {', '.join(words)}"


def speed_rows(cases: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Speed and memory of each case, and compiled against eager where both were measured."""
    eager = {}
    for case, result in zip(cases, found, strict=True):
        name, setting = name_of(case), describe(case)
        if result["out_of_memory"]:
            yield Row(f"speed, {name}", setting, "out of memory")
            continue
        mfu = "MFU unknown for this device" if result["mfu"] is None else f"{100 * result['mfu']:.1f} % MFU"
        yield Row(
            f"speed, {name}",
            setting,
            f"{result['images_per_s']:.1f} images/s",
            f"{mfu}, {result['seconds']:.3f} s a step",
        )
        if result["peak_bytes"] is not None and not case.get("compile"):
            ratio = result["peak_bytes"] / result["planned_bytes"]
            yield Row(
                f"memory, {name}",
                setting,
                f"{result['peak_bytes'] / 2**30:.2f} GiB",
                f"plan {result['planned_bytes'] / 2**30:.2f} GiB, ratio {ratio:.2f} < {FREE}",
                ratio < FREE,
            )
        key = json.dumps({k: v for k, v in case.items() if k != "compile"}, sort_keys=True)
        if not case.get("compile"):
            eager[key] = result
        elif key in eager:
            yield from compiled_rows(name, setting, eager[key], result)


def compiled_rows(name: str, setting: str, eager: dict[str, Any], result: dict[str, Any]) -> Iterator[Row]:
    """Losses with dropout on; rounding differs, and a few Adam steps enlarge it."""
    limit = 1e-3 if "fp32" in setting else 2e-2
    pairs = zip(eager["loss"], result["loss"], strict=True)
    yield below(f"compiled, {name}", f"{setting}: losses against eager", max(abs(a - b) for a, b in pairs), limit)
    yield Row(f"compiled, {name}", f"{setting}: speed against eager", f"{eager['seconds'] / result['seconds']:.2f} x")


def together(device: str, ranks: int, small: bool) -> Iterator[Row]:
    """The same global batch on one rank by accumulation and on all ranks under ZeRO-1: same losses, how much faster."""
    base = {**TINY, "precision": "bf16", "zero": 1, "micro": 2} if small else size("GPT-B", 32)
    (alone,) = train([{**base, "accumulation": ranks}], device, 1)
    (shared,) = train([base], device, ranks)
    where = f"ZeRO-1, {ranks} ranks"
    if alone["out_of_memory"] or shared["out_of_memory"]:
        yield Row(f"together, {name_of(base)}", where, "out of memory")
        return
    pairs = zip(alone["loss"], shared["loss"], strict=True)
    yield below(f"together, {name_of(base)}", f"{where}: losses", max(abs(a - b) for a, b in pairs), 2e-2)
    faster = alone["seconds"] / shared["seconds"]
    yield Row(
        f"together, {name_of(base)}",
        where,
        f"{shared['images_per_s']:.1f} images/s",
        f"{faster:.2f} x one rank, {100 * faster / ranks:.0f} % of {ranks} x",
    )
    if shared["peak_bytes"] is not None:
        ratio = shared["peak_bytes"] / shared["planned_bytes"]
        found, plan = (f"{shared[key] / 2**30:.2f} GiB" for key in ("peak_bytes", "planned_bytes"))
        yield Row(f"memory, {name_of(base)}", where, found, f"plan {plan}, ratio {ratio:.2f} < {FREE}", ratio < FREE)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: does the check itself work?")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    args = parser.parse_args(words)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here; run it where there is one (make test needs none)", file=sys.stderr)
        return 2
    from tests.gpu import batches, parity

    ranks = min(torch.cuda.device_count(), 8) if args.device == "cuda" else 1
    chosen = cases(args.small, not args.no_compile)
    rows = list(parity.rows(torch.device(args.device), args.small))
    rows += batches.rows(torch.device(args.device))
    rows += speed_rows(chosen, train(chosen, args.device, 1))
    if ranks > 1:
        rows += together(args.device, ranks, args.small)
    print("\n".join(["llamagen gpu-check", *table.environment(args.device), "", *table.lines(rows), ""]))
    failed = sum(row.ok is False for row in rows)
    print(f"{failed} of {sum(row.ok is not None for row in rows)} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
