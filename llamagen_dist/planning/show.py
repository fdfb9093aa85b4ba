"""``llamagen plan``'s answer for a person: tables on a terminal, aligned text in a pipe."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from llamagen_dist.console import duration
from llamagen_dist.tracking.devices import GIB

PIPE_WIDTH = 110


def show(found: dict[str, Any], title: str) -> None:
    """Print all of it to stdout."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    console.print(f"{title}: {_model(found)}")
    console.print(f"tokens: {_tokens(found['tokens'], found['model']['condition'])}")
    console.print(_costs(found))
    console.print(f"FLOPs: {found['flops']['convention']}.", style="dim")
    for line in _run(found):
        console.print(line)
    console.print()
    console.print(_layouts(found))
    console.print(_legend(found), style="dim")
    for one in found["refused"]:
        console.print(f"refused: {one['layout']}: {one['reason']}")
    for text in found["warnings"]:
        console.print(f"note: {text}")
    console.print(f"=> {found['recommendation']['text']}", style="bold")


def _model(found: dict[str, Any]) -> str:
    m = found["model"]
    name = m["size"] or "own size"
    rung = f" (largest rung of the ladder: {found['rung']})" if found["rung"] else ""
    heads = f"{m['n_head']} heads" + (f" ({m['n_kv_head']} key-value)" if m["n_kv_head"] else "")
    return (
        f"{name}{rung}, {m['condition']}-conditional: {m['n_layer']} layers, {heads}, width {m['dim']}, "
        f"feed-forward {m['ffn_dim']}"
    )


def _tokens(t: dict[str, Any], condition: str) -> str:
    classes = f", {t['classes']:,} classes" if condition == "class" else ""
    return f"vocabulary {t['vocab_size']:,}, {t['per_image']} per image{classes} ({t['source']})"


def _table(gap: int) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold underline")


def _costs(found: dict[str, Any]) -> Table:
    table = _table(2)
    table.add_column("parameters")
    table.add_column("", justify="right")
    table.add_column("")
    table.add_column("FLOPs per image", no_wrap=True)
    table.add_column("", justify="right")
    flops = found["flops"]
    left = [*found["parameters"]["groups"].items(), ("total", found["parameters"]["total"])]
    right = [(f"forward, {name}", number) for name, number in flops["forward_per_image"].items()]
    right.append(("training (3 x forward)", flops["training_per_image"]))
    right.append(("  with dense attention", flops["training_per_image_dense_attention"]))
    right.append(("training, per token", flops["training_per_token"]))
    for at in range(max(len(left), len(right))):
        group = (left[at][0], f"{left[at][1]:,}") if at < len(left) else ("", "")
        part = (right[at][0], f"{right[at][1]:.4e}") if at < len(right) else ("", "")
        table.add_row(*group, "", *part)
    return table


def _run(found: dict[str, Any]) -> list[str]:
    run, machine, time, kept = found["run"], found["machine"], found["time"], found["checkpoint"]
    origin = "given" if machine["mfu_is"] == "given" else "assumed, not measured"
    mfu = f"{100 * machine['mfu']:.0f} % MFU ({origin}) of {machine['peak_flops'] / 1e12:.0f} TFLOP/s"
    gpus = f"{machine['gpus']} x {machine['gpu']}"
    return [
        f"run: {run['images']:,} images = {run['steps']:,} steps of {run['global_batch']} = {run['tokens']:.3e} tokens "
        f"= {run['training_flops']:.3e} FLOPs",
        f"time: {_hours(time['hours'])} on {gpus} = {time['gpu_hours']:,.1f} GPU-hours at {mfu} "
        f"({machine['precision']}); {_brief(time['seconds_per_step'])} a step",
        f"checkpoint: {_size(kept['bytes'])} on disk whatever the layout, {kept['kept']} kept last; "
        f"{duration(kept['seconds'])} to write at {kept['bandwidth_bytes_per_s'] / 1e9:g} GB/s (assumed); "
        f"host memory for it {_size(kept['host_copy_bytes_per_rank'])} per rank",
    ]


def _layouts(found: dict[str, Any]) -> Table:
    table = _table(1)
    ema = any(row["bytes"]["ema"] for row in found["layouts"])
    words = ["ZeRO", "TP", "DP", "micro", "weights", "grads", "optim"]
    words += ["EMA"] if ema else []
    words += ["buckets", "activ", "logits", "total", "fits", "max micro"]
    for word in words:
        table.add_column(word, justify="right", no_wrap=True)
    own = found["configured"]
    for row in found["layouts"]:
        size = row["bytes"]
        cells = [
            str(row["zero"]),
            f"{row['tensor']}{'*' if row['crosses_nodes'] else ''}",
            str(row["data"]),
            str(row["micro"]),
        ]
        cells += [_gib(size["weights"]), _gib(size["gradients"]), _gib(size["masters"] + size["moments"])]
        cells += [_gib(size["ema"])] if ema else []
        cells += [_gib(size["buckets"]), _gib(size["activations"] + size["working"]), _gib(size["logits"])]
        largest = "/".join(str(n) for n in row["largest_micro"].values())
        mine = all(row[key] == own.get(key) for key in ("zero", "tensor", "data", "micro"))
        fits = "yes" if row["fits"] else "no"
        cells += [_gib(row["total_bytes"]), fits, largest]
        cells[0] = ("> " if mine else "") + cells[0]
        style = "bold" if mine else "dim" if not row["fits"] else None
        table.add_row(*cells, style=style)
    return table


def _legend(found: dict[str, Any]) -> str:
    machine = found["machine"]
    usable = machine["memory_bytes"] * (1 - found["headroom"])
    own = found["configured"]
    here = f"the config as it is is refused: {own['refused']}" if "refused" in own else "> = the config as it is"
    nodes = f" * = TP across nodes of {machine['gpus_per_node']} GPUs." if _crosses(found) else ""
    return (
        f"GiB per GPU at the fullest moment; fits = at most {usable / GIB:.1f} of {machine['memory_bytes'] / GIB:.1f} "
        f"({100 * found['headroom']:.0f} % left free for the CUDA context, NCCL, workspaces and fragmentation, which "
        f"were not verified here). max micro: the largest micro-batch that fits with recompute_every 0/2/1 (0: none "
        f"does).{nodes} {here}"
    )


def _crosses(found: dict[str, Any]) -> bool:
    return any(row["crosses_nodes"] for row in found["layouts"])


def _gib(size: float) -> str:
    if size == 0:
        return "0"
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2f}"


def _size(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


def _hours(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours > 48 else duration(hours * 3600)


def _brief(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
