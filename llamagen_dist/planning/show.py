"""``llamagen plan``'s answer for a person: tables on a terminal, aligned text in a pipe."""

import itertools
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from llamagen_dist.console import duration
from llamagen_dist.tracking.devices import GIB

PIPE_WIDTH = 110


def show(plan: dict[str, Any], title: str) -> None:
    """Print all of ``plan.answer`` to stdout."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    console.print(f"{title}: {_model(plan)}")
    t, by_class = plan["tokens"], plan["model"]["condition"] == "class"
    classes = f", {t['classes']:,} classes" if by_class else ""
    console.print(f"tokens: vocabulary {t['vocab_size']:,}, {t['per_image']} per image{classes} ({t['source']})")
    console.print(_costs(plan))
    console.print(f"FLOPs: {plan['flops']['convention']}.", style="dim")
    for line in _run(plan):
        console.print(line)
    console.print()
    console.print(_layouts(plan))
    console.print(_legend(plan), style="dim")
    for one in plan["refused"]:
        console.print(f"refused: {one['layout']}: {one['reason']}")
    for text in plan["warnings"]:
        console.print(f"note: {text}")
    console.print(f"=> {plan['recommendation']['text']}", style="bold")


def _model(plan: dict[str, Any]) -> str:
    m = plan["model"]
    rung = f" (largest rung of the ladder: {plan['rung']})" if plan["rung"] else ""
    heads = f"{m['n_head']} heads" + (f" ({m['n_kv_head']} key-value)" if m["n_kv_head"] else "")
    return (
        f"{m['size'] or 'own size'}{rung}, {m['condition']}-conditional: {m['n_layer']} layers, {heads}, "
        f"width {m['dim']}, feed-forward {m['ffn_dim']}"
    )


def _table(gap: int) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold underline")


def _costs(plan: dict[str, Any]) -> Table:
    table, flops = _table(2), plan["flops"]
    table.add_column("parameters")
    table.add_column("", justify="right")
    table.add_column("")
    table.add_column("FLOPs per image", no_wrap=True)
    table.add_column("", justify="right")
    groups = {**plan["parameters"]["groups"], "total": plan["parameters"]["total"]}
    parts = {f"forward, {name}": number for name, number in flops["forward_per_image"].items()} | {
        "training (3 x forward)": flops["training_per_image"],
        "  with dense attention": flops["training_per_image_dense_attention"],
        "training, per token": flops["training_per_token"],
    }
    left = [(name, f"{number:,}") for name, number in groups.items()]
    right = [(name, f"{number:.4e}") for name, number in parts.items()]
    for one, other in itertools.zip_longest(left, right, fillvalue=("", "")):
        table.add_row(*one, "", *other)
    return table


def _run(plan: dict[str, Any]) -> list[str]:
    run, machine, time, kept = plan["run"], plan["machine"], plan["time"], plan["checkpoint"]
    origin = "given" if machine["mfu_is"] == "given" else "assumed, not measured"
    mfu = f"{100 * machine['mfu']:.0f} % MFU ({origin}) of {machine['peak_flops'] / 1e12:.0f} TFLOP/s"
    gpus, step = f"{machine['gpus']} x {machine['gpu']}", time["seconds_per_step"]
    hours = f"{time['hours'] / 24:.1f} days" if time["hours"] > 48 else duration(time["hours"] * 3600)
    return [
        f"run: {run['images']:,} images = {run['steps']:,} steps of {run['global_batch']} = {run['tokens']:.3e} tokens "
        f"= {run['training_flops']:.3e} FLOPs",
        f"time: {hours} on {gpus} = {time['gpu_hours']:,.1f} GPU-hours at {mfu} ({machine['precision']}); "
        f"{f'{step:.2f} s' if step >= 1 else f'{step * 1e3:.0f} ms'} a step",
        f"checkpoint: {_size(kept['bytes'])} on disk whatever the layout, {kept['kept']} kept last; "
        f"{duration(kept['seconds'])} to write at {kept['bandwidth_bytes_per_s'] / 1e9:g} GB/s (assumed); "
        f"host memory for it {_size(kept['host_copy_bytes_per_rank'])} per rank",
    ]


def _layouts(plan: dict[str, Any]) -> Table:
    table, own = _table(1), plan["configured"]
    ema = any(row["bytes"]["ema"] for row in plan["layouts"])
    headings = ["ZeRO", "TP", "DP", "micro", "weights", "grads", "optim", *(["EMA"] if ema else [])]
    for heading in [*headings, "buckets", "activ", "logits", "total", "fits", "max micro"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan["layouts"]:
        size = row["bytes"]
        mine = all(row[key] == own.get(key) for key in ("zero", "tensor", "data", "micro"))
        parts = [size["weights"], size["gradients"], size["masters"] + size["moments"], *([size["ema"]] if ema else [])]
        parts += [size["buckets"], size["activations"] + size["working"], size["logits"], row["total_bytes"]]
        table.add_row(
            f"{'> ' if mine else ''}{row['zero']}",
            f"{row['tensor']}{'*' if row['crosses_nodes'] else ''}",
            str(row["data"]),
            str(row["micro"]),
            *map(_gib, parts),
            "yes" if row["fits"] else "no",
            "/".join(str(n) for n in row["largest_micro"].values()),
            style="bold" if mine else "dim" if not row["fits"] else None,
        )
    return table


def _legend(plan: dict[str, Any]) -> str:
    machine, own = plan["machine"], plan["configured"]
    usable = machine["memory_bytes"] * (1 - plan["headroom"])
    mine = f"the config as it is is refused: {own['refused']}" if "refused" in own else "> = the config as it is"
    crosses = any(row["crosses_nodes"] for row in plan["layouts"])
    nodes = f" * = TP across nodes of {machine['gpus_per_node']} GPUs." if crosses else ""
    return (
        f"GiB per GPU at the fullest moment; fits = at most {usable / GIB:.1f} of {machine['memory_bytes'] / GIB:.1f} "
        f"({100 * plan['headroom']:.0f} % left free for the CUDA context, NCCL, workspaces and fragmentation, which "
        f"were not verified here). max micro: the largest micro-batch that fits with recompute_every 0/2/1 (0: none "
        f"does).{nodes} {mine}"
    )


def _gib(size: float) -> str:
    return "0" if size == 0 else f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2f}"


def _size(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"
