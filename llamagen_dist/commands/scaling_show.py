"""``llamagen scaling advise``'s answer for a person."""

from typing import Any

from rich.table import Table

from llamagen_dist.console import Screen, count
from llamagen_dist.tracking.devices import GIB


def show(result: dict[str, Any]) -> None:
    """Print all of ``advise``'s result to stdout."""
    screen = Screen()
    machine, budget = result["machine"], result["budget"]
    if "target" in result:
        target = result["target"]
        band = target.get("ci95")
        high = "no end" if band and band[1] is None else f"{band[1]:.3g}" if band else ""
        within = f" ({band[0]:.3g} to {high})" if band else ""
        screen.say(
            f"loss {target['loss']:g} takes {target['flops']:.3g} FLOPs{within}, "
            f"{_number(target['gpu_hours'])} GPU-hours"
        )
    screen.say(
        f"{budget['flops']:.3g} FLOPs: {_number(budget['gpu_hours'])} GPU-hours of {machine['gpu']} at "
        f"{100 * machine['mfu']:.0f} % MFU ({machine['mfu_is']})"
    )
    screen.console.print(_table(result))
    best, flat = result["optimum"], result["flat"]
    counted = {"blocks": "the blocks alone", "total": "all parameters"}[result["record"]["params_fit"]]
    band = best.get("ci95", {})
    shown = {name: f" ({_number(low)} to {_number(high)})" for name, (low, high) in band.items()}
    screen.say(
        f"best between these: N* ({counted}) {count(best['params_fit'])}{shown.get('params_fit', '')}, "
        f"D* {count(best['tokens'])} tokens{shown.get('tokens', '')}, "
        f"D/N {_number(best['tokens_per_param'])}{shown.get('tokens_per_param', '')}"
    )
    screen.say(
        f"as good within {100 * flat['within']:g} % of the loss: {' to '.join(count(n) for n in flat['params'])} "
        "parameters; take the smaller for cheap sampling"
    )
    for run in result["next_runs"]:
        screen.say(
            f"to know N* better: {run['n_layer']} layers of width {run['dim']} on {count(run['images'])} images "
            f"({run['flops']:.3g} FLOPs) narrows it by {100 * run['narrows_by']:.0f} %"
        )
    for shape in result["does_not_fit"]:
        screen.say(f"left out, fits on no layout: {shape['n_layer']} layers of width {shape['dim']}")
    for text in result["warnings"]:
        screen.say(f"note: {text}")


def _table(result: dict[str, Any]) -> Table:
    rows = [_cells(row) for row in result["configs"]]
    table = Table(box=None, header_style="")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells.values())
    return table


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """By column; columns that this advice has no figures for are left out."""
    cells = {
        "": str(row["rank"]),
        "layers": str(row["n_layer"]),
        "width": str(row["dim"]),
        "heads": str(row["n_head"]),
        "parameters": count(row["params"]),
        "tokens": count(row["tokens"]),
        "epochs": f"{row['epochs']:.1f}" if "epochs" in row else "",
        "loss": f"{row['loss']:.4f}",
        "95 %": "{:.4f} to {:.4f}".format(*row["ci95"]) if "ci95" in row else "",
        "FID": f"{row['fid']:.2f}" if "fid" in row else "",
        "FID 95 %": "{:.2f} to {:.2f}".format(*row["fid_ci95"]) if "fid_ci95" in row else "",
        "hours": _number(row["hours"]),
        "layout": _layout(row["layout"]),
    }
    return {name: text for name, text in cells.items() if text}


def _layout(layout: dict[str, Any]) -> str:
    parts = [f"ZeRO-{layout['zero']}", f"micro {layout['micro_batch']}"]
    if layout["tensor"] > 1:
        parts.insert(1, f"TP {layout['tensor']}")
    if layout["recompute_every"]:
        parts.append(f"recompute {layout['recompute_every']}")
    return f"{', '.join(parts)}: {layout['bytes'] / GIB:.1f} GiB"


def _number(value: float) -> str:
    return count(value) if value >= 1000 else f"{value:.3g}"
