"""``llamagen scaling isoflop | lr | recipes | ladder | advise``, and the words that say what is read."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamagen_dist import __version__
from llamagen_dist.commands import options
from llamagen_dist.commands.plan import add_gpu, machine
from llamagen_dist.commands.scaling_show import show
from llamagen_dist.config import GPTConfigFile, load
from llamagen_dist.console import LOG
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text
from llamagen_dist.planning.plan import model_for, tokens_of

if TYPE_CHECKING:
    from llamagen_dist.scaling.inputs import Inputs

UNITS = {"flops": None, "gpu-hours": 1.0, "gpu-days": 24.0}


def add_inputs(parser: argparse.ArgumentParser, runs: str = "runs") -> None:
    """What every action that reads runs has."""
    parser.add_argument(
        runs,
        nargs="+",
        metavar="RUNS",
        help="finished runs: folders, sweeps, metrics.jsonl, a CSV or JSON lines with params,tokens,loss[,flops,run], "
        "or wandb:ENTITY/PROJECT; or llamagen-fid, LlamaGen's published FIDs",
    )
    parser.add_argument(
        "--params",
        choices=("blocks", "total"),
        default="blocks",
        help="what N counts of our own runs: the blocks' matrices, or everything (default: %(default)s)",
    )
    parser.add_argument("--metric", metavar="NAME", help="fit this column (or key of metrics.jsonl), not the loss")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="params=NAME", help="headers of a table that are not recognised"
    )
    parser.add_argument("--drop-bad", action="store_true", help="leave out and count points that are no numbers")
    parser.add_argument("--vocab", type=int, default=16384, help="codes, to see implausible losses (default: 16384)")
    parser.add_argument("--tokens-per-image", type=int, default=1, metavar="N", help="the tokens column counts images")
    parser.add_argument("--bits", action="store_true", help="the loss is in bits per token")
    parser.add_argument("--as-given", action="store_true", help="no check of units")


def inputs_of(args: argparse.Namespace, places: list[str]) -> "Inputs":
    """Read them, and say what was recognised and what was left out. Raises UserError."""
    from llamagen_dist.scaling.inputs import read
    from llamagen_dist.scaling.points import NAMES, Options

    options.within(args, "vocab", 2)
    options.within(args, "tokens-per-image", 1)
    columns = dict(word.partition("=")[::2] for word in args.columns)
    for role, header in columns.items():
        if role not in NAMES or not header:
            raise UserError(f"--columns {role}={header}: write one of {', '.join(NAMES)}=HEADER")
    how = Options(args.metric, columns, args.drop_bad, args.vocab, args.tokens_per_image, args.bits, args.as_given)
    found = read(places, args.params, how)
    for text in found.notes:
        LOG.info(f"note: {text}")
    for one in found.dropped:
        LOG.info(f"left out: {one.what}: {one.why}")
    return found


def add(actions: Any) -> None:
    """The five actions' options."""
    text = "the best size of each budget by a parabola in log N, and how it grows"
    isoflop = actions.add_parser("isoflop", help=text, description=text)
    add_inputs(isoflop)
    isoflop.add_argument("--at", type=float, nargs="+", default=[], metavar="FLOPS", help="also for these budgets")
    isoflop.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the result")

    text = "the best learning rate per width, whether it moves with the width, and runs that are far from it"
    lr = actions.add_parser("lr", help=text, description=text)
    add_inputs(lr)
    lr.add_argument("--check", nargs="+", metavar="RUNS", help="runs to compare with lr*")
    lr.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the result")

    text = "recipes (order, guidance, optimizer, norms) against a tuned baseline, with bands over seeds"
    recipes = actions.add_parser("recipes", help=text, description=text)
    recipes.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of finished runs, such as sweeps")
    recipes.add_argument("--out", type=Path, metavar="FILE.json", help="where to write the result")

    text = "write a sweep for a law: sizes x budgets of equal FLOPs, with a rate per size"
    ladder = actions.add_parser("ladder", help=text, description=text)
    ladder.add_argument("config", type=Path, help="a YAML file of kind gpt: what all sizes have in common")
    ladder.add_argument("--sizes", nargs="+", required=True, metavar="LAYERSxWIDTH")
    ladder.add_argument("--budgets", nargs="+", type=float, required=True, metavar="FLOPS")
    ladder.add_argument("--lr", type=float, required=True, help="the rate at --at-width")
    ladder.add_argument("--at-width", type=int, required=True)
    ladder.add_argument("--lr-power", type=float, default=-1.0, help="lr ~ width^POWER (default: -1; muP: 0)")
    ladder.add_argument("--batch", type=int, help="images per step (default: the config's)")
    for name in ("tokens", "classes", "vocab"):
        ladder.add_argument(f"--{name}", type=int, help="default: the shards', or LlamaGen's")
    ladder.add_argument("--out", type=Path, required=True, metavar="SWEEP.yaml")

    text = "what to train with a budget, by a fitted law: sizes, tokens, hours, what is not known, what to run next"
    advise = actions.add_parser("advise", help=text, description=text)
    advise.add_argument("fit", type=Path, metavar="FIT.json", help="what llamagen scaling fit wrote")
    advise.add_argument("--budget", type=float, help="so much of --unit")
    advise.add_argument("--unit", choices=tuple(UNITS), default="gpu-hours", help="default: %(default)s")
    advise.add_argument("--target-loss", type=float, metavar="L", help="what the least budget for this loss is")
    advise.add_argument("--gpus", type=int, default=8, metavar="N", help="default: %(default)s")
    advise.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    add_gpu(advise)
    advise.add_argument("--unique-images", type=float, metavar="N", help="different images there are; more are repeats")
    advise.add_argument("--repeats-worth", type=float, metavar="R", help="R_D*: how many repeats are worth training on")
    advise.add_argument("--fid-fit", type=Path, metavar="FIT.json", help="a fit of FID, to show it beside the loss")
    advise.add_argument("--json", action="store_true", help="print everything as JSON")
    advise.add_argument("--out", type=Path, metavar="FILE.json", help="write everything as JSON")


def run(args: argparse.Namespace) -> None:
    {"isoflop": _isoflop, "lr": _lr, "recipes": _recipes, "ladder": _ladder, "advise": _advise}[args.action](args)


def write(out: Path | None, result: dict[str, Any]) -> None:
    """Raises UserError where it cannot be written."""
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the JSON file to write")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def _isoflop(args: argparse.Namespace) -> None:
    from llamagen_dist.scaling.isoflop import isoflop

    found = inputs_of(args, args.runs)
    result = {**isoflop(found.points, args.at), "dropped": found.dropped_rows(), "record": found.record()}
    write(args.out, result)
    for one in result["budgets"]:
        LOG.info(
            f"{one['flops']:.3g} FLOPs, {one['sizes']} sizes: best {one['params']:,.0f} parameters on "
            f"{one['tokens']:,.0f} tokens, loss {one['loss']:.4f}"
        )
    band = result.get("exponents_ci95", {}).get("params")
    shown = f" ({band[0]:.3f} to {band[1]:.3f})" if band else ""
    LOG.info(f"N* ~ C^{result['exponents']['params']:.3f}{shown}, D* ~ C^{result['exponents']['tokens']:.3f}")
    for one in result["at"]:
        LOG.info(f"{one['flops']:.3g} FLOPs: {one['params']:.4g} parameters on {one['tokens']:.4g} tokens")
    for text in result["warnings"]:
        LOG.info(f"note: {text}")


def _lr(args: argparse.Namespace) -> None:
    from llamagen_dist.scaling.rates import best_rates

    found = inputs_of(args, args.runs)
    check = inputs_of(args, args.check).points if args.check else None
    result = {**best_rates(found.points, check), "dropped": found.dropped_rows(), "record": found.record()}
    write(args.out, result)
    for one in result["widths"]:
        band = " ({:.3g} to {:.3g})".format(*one["ci95"]) if "ci95" in one else ""
        LOG.info(f"width {one['width']:g}: lr* {one['lr']:.3g}{band}, {one['rates']} rates, loss {one['loss']:.4f}")
    if "slope" in result:
        slope = result["slope"]
        band = " ({:.2f} to {:.2f})".format(*slope["ci95"]) if "ci95" in slope else ""
        agrees = " and ".join(slope.get("agrees_with", [])) or "neither muP nor the standard parametrisation"
        LOG.info(f"lr* ~ width^{slope['value']:.2f}{band}: agrees with {agrees}")
    for one in result.get("checked", []):
        if one["flagged"]:
            LOG.info(
                f"{one['run']}: lr {one['lr']:.3g} is {one['factor']:.2g} x lr*, some {one['excess_loss']:.3f} of loss"
            )
    for text in result["warnings"]:
        LOG.info(f"note: {text}")


def _recipes(args: argparse.Namespace) -> None:
    from llamagen_dist.report.recipes import overall, span, to_loss
    from llamagen_dist.scaling.recipe_runs import recipes

    result, dropped = recipes(args.runs)
    for one in dropped:
        LOG.info(f"left out: {one.what}: {one.why}")
    record = {"versions": {"llamagen_dist": __version__}, "inputs": [{"path": str(path)} for path in args.runs]}
    result |= {"dropped": [vars(one) for one in dropped], "record": record}
    write(args.out, result)
    for task in result["tasks"]:
        LOG.info(f"{task['task']}:")
        for row in task["rows"]:
            fid = f", FID {span(row['fid'], '{:.2f}')}" if "fid" in row else ""
            LOG.info(
                f"  {row['recipe']}: loss {span(row['loss'])}, baseline's loss at {to_loss(row)} of its compute{fid}"
            )
    for name, wins, of, text in overall(result["tasks"]):
        LOG.info(f"{name}: better than the baseline in every seed in {wins} of {of} tasks; its loss at {text}")
    for text in result["warnings"]:
        LOG.info(f"note: {text}")


def _ladder(args: argparse.Namespace) -> None:
    from llamagen_dist.scaling.design import Rates, as_yaml, sweep_of

    config = load(args.config, kind="gpt")
    assert isinstance(config, GPTConfigFile)
    for name in ("lr", "at-width"):
        options.within(args, name, 0, above=True)
    options.within(args, "batch", 1)
    like = model_for(config, tokens_of(config, args.vocab, args.tokens, args.classes))
    batch = args.batch or config.train.global_batch
    try:
        beside = args.config.resolve().relative_to(args.out.resolve().parent.parent)
        shown = f"../{beside}"
    except ValueError:
        shown = str(args.config.resolve())
    rates = Rates(args.lr, args.at_width, args.lr_power)
    sweep = sweep_of(like, args.sizes, args.budgets, rates, batch, shown)
    try:
        write_text(args.out, as_yaml(sweep))
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    images = sum(point["train.images"] for point in sweep["list"].values())
    LOG.info(
        f"{args.out}: {len(sweep['list'])} sizes, {images:,} images, {len(args.sizes) * max(args.budgets):.3g} FLOPs"
    )


def _advise(args: argparse.Namespace) -> None:
    from llamagen_dist.scaling.advise import Ask, advise
    from llamagen_dist.scaling.basis import read_fit

    for name in ("budget", "target-loss", "unique-images", "repeats-worth"):
        options.within(args, name, 0, above=True)
    for name in ("gpus", "gpus-per-node"):
        options.within(args, name, 1, 100_000)
    if args.budget is None and args.target_loss is None:
        raise UserError("give --budget N --unit gpu-hours, or --target-loss L")
    there = machine(args, args.gpus, args.gpus_per_node)
    ask = Ask(there, None, args.target_loss, args.unique_images, args.repeats_worth)
    hours = UNITS[args.unit]
    if args.budget is not None:
        each = 1.0 if hours is None else hours * 3600 * there.mfu * there.device.peaks[ask.precision]
        ask = Ask(there, args.budget * each, args.target_loss, args.unique_images, args.repeats_worth)
    result = advise(read_fit(args.fit), ask, None if args.fid_fit is None else read_fit(args.fid_fit))
    write(args.out, result)
    if args.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        show(result)
