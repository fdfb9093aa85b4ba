"""``llamagen generate CHECKPOINT --class NAME|INDEX … --out grid.png``: pictures of chosen classes, or of captions."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llamagen_dist.commands import options
from llamagen_dist.errors import UserError
from llamagen_dist.sampling.guidance import SCHEDULES

if TYPE_CHECKING:
    from llamagen_dist.sampling.drawing import Source

PER_CLASS, CFG = 8, 2.0
LIMITS: dict[str, tuple[float, float, bool]] = {
    "cfg": (1, math.inf, False),
    "cfg-interval": (-1, math.inf, False),
    "guidance-power": (0, math.inf, True),
    "guidance-start": (0, 1, False),
    "beta": (0, 1, True),
    "temperature": (0, math.inf, False),
    "top-k": (0, math.inf, False),
    "top-p": (0, 1, True),
    "window": (1, math.inf, False),
    "first-tokens": (1, math.inf, False),
}
"""Of the numbers among the settings: least and most, and whether it must be more than the least."""
VARIED = ("cfg", "beta", "temperature", "top-k", "top-p", "first-tokens")  # by --grid-over
SETTINGS = {name.replace("-", "_"): name.replace("-", "_") for name in (*LIMITS, "guidance")} | {"cfg": "cfg_scale"}
"""What was given -> the field of ``pictures.Settings``, whose defaults are the options'."""
OF_SCHEDULE = {"cfg_interval": "constant", "guidance_power": "power-cosine", "guidance_start": "step"}
DECISIVE = (*SETTINGS, "per_class", "seed", "weights", "quantize", "seeds", "film", "grid_over")
"""Options that decide what is drawn: ``--again`` takes that from the picture. None where they were not given."""
MOST_SEED = (1 << 31) - 1
MOST_PICTURES = 1 << 16  # in a row
WHOLE = ("top-k", "first-tokens")  # options that are whole numbers


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        nargs="?",
        help="a GPT's run directory or step_… folder; with --again: where it lies now, if it was moved",
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--class",
        dest="classes",
        action="extend",
        nargs="+",
        metavar="NAME|INDEX",
        help="classes by name or number; all means every one",
    )
    wanted.add_argument(
        "--caption", dest="captions", action="extend", nargs="+", metavar="TEXT", help="for a text-conditional GPT"
    )
    wanted.add_argument(
        "--again", type=Path, metavar="PICTURE", help="the same picture again, from what its .png says of itself"
    )
    wanted.add_argument("--interactive", action="store_true", help="a page on this machine to draw with (extra demo)")
    parser.add_argument("--port", type=int, metavar="N", help="of --interactive (default: 7860)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a .png or .jpg: one row per class or caption (--again: NAME-again.png)",
    )
    parser.add_argument("--text-encoder", type=Path, metavar="PATH", help="default: the one the checkpoint names")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: the one its token shards name")
    parser.add_argument("--per-class", type=int, metavar="N", help="pictures per row (default: 8)")
    parser.add_argument("--cfg", "--cfg-scale", type=float, metavar="S", help="guidance; 1 is none (default: 2)")
    parser.add_argument(
        "--guidance",
        choices=SCHEDULES,
        help="how guidance rises to --cfg along the image (default: constant)",
    )
    parser.add_argument("--cfg-interval", type=int, metavar="K", help="constant: only the first K + 2 tokens; -1: all")
    parser.add_argument(
        "--guidance-power", type=float, metavar="P", help="power-cosine: higher is later (default: 2.75)"
    )
    parser.add_argument(
        "--guidance-start", type=float, metavar="F", help="step: share without guidance (default: 0.18)"
    )
    parser.add_argument(
        "--beta",
        type=float,
        metavar="B",
        help="of a guidance-free GPT, for --cfg: lower guides more (default: 1)",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="default: 1; 0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="default: 0, all codes")
    parser.add_argument("--top-p", type=float, metavar="P", help="default: 1, all codes")
    parser.add_argument("--window", type=int, metavar="W", help="tokens per pass, speculatively (default: 1)")
    parser.add_argument(
        "--first-tokens",
        type=int,
        metavar="K",
        help="of prefix tokens: draw only so many (default: all)",
    )
    weights = parser.add_mutually_exclusive_group()
    options.add_weights(weights)
    weights.add_argument("--ema", dest="weights", action="store_const", const="ema", help="short for --weights ema")
    parser.add_argument("--quantize", choices=("int8",), help="round linear layers to 8 bits (default: fp32)")
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--seed", type=int, metavar="N", help="of all pictures (default: 0)")
    noise.add_argument("--seeds", metavar="0-7|1,5,9", help="one for each picture of a row, instead of --per-class")
    parser.add_argument("--film", type=Path, metavar="FILE", help="also: the first picture, row of tokens by row")
    parser.add_argument(
        "--grid-over",
        nargs="+",
        metavar="OPTION=V,V",
        help=f"vary one or two of {', '.join(VARIED)}: down, then across; as cfg=1,2,4 top-k=0,100",
    )


def run(args: argparse.Namespace) -> None:
    given = [name.replace("_", "-") for name in DECISIVE if getattr(args, name) is not None]
    if given and args.again is not None:
        raise UserError(f"--{given[0]}: --again takes that from {args.again}; leave it out")
    if args.interactive and (set_there := [name for name in given if name not in ("weights", "quantize")]):
        raise UserError(f"--{set_there[0]}: is set on the page; leave it out")
    if args.port is not None and not args.interactive:
        raise UserError("--port: belongs to --interactive; leave it out")
    if args.again is not None:
        from llamagen_dist.sampling.again import draw_again

        for line in draw_again(args.again, args.out, args.checkpoint, args.tokenizer, args.text_encoder):
            print(line)
        return
    if args.checkpoint is None:
        raise UserError("CHECKPOINT: name a GPT's run directory or step_… folder")
    if args.interactive:
        draw_on_a_page(args)
        return
    if args.out is None:
        raise UserError("--out: name the .png or .jpg to write")
    axes = grid_axes(args.grid_over or [])
    pictures = pictures_of_a_row(args, 1 if len(axes) == 2 else PER_CLASS)
    for option, (low, high, above) in LIMITS.items():
        options.within(args, option, low, high, above=above)
    for name, schedule in OF_SCHEDULE.items():
        if getattr(args, name) is not None and (args.guidance or "constant") != schedule:
            raise UserError(f"--{name.replace('_', '-')}: belongs to --guidance {schedule}; leave it out")
    if args.film is not None and axes:
        raise UserError("--film: shows one picture being drawn; leave out --grid-over")
    draw_new(args, axes, pictures)


def draw_on_a_page(args: argparse.Namespace) -> None:
    from llamagen_dist.sampling import demo, drawing

    if args.out is not None:
        raise UserError("--out: the page has a button to download a picture; leave it out")
    options.within(args, "port", 1, (1 << 16) - 1)
    port = args.port or demo.PORT
    demo.gradio()  # what is missing is said before anything is loaded
    demo.check_port(port)
    weights = options.which_weights(args)
    opened = drawing.open_source(
        args.checkpoint, weights, args.tokenizer, None, args.text_encoder, either=True, quantized=args.quantize
    )
    demo.run(opened, weights, args.text_encoder, port)


def pictures_of_a_row(args: argparse.Namespace, per_class: int) -> list[tuple[int, int]]:
    """(seed, number) of each picture in a row. per_class: where neither option says how many. Raises UserError."""
    options.within(args, "per-class", 1, MOST_PICTURES)
    options.within(args, "seed", 0, MOST_SEED)
    if args.seeds is None:
        count = args.per_class if args.per_class is not None else per_class
        return [(args.seed or 0, number) for number in range(count)]
    seeds = seed_list(args.seeds)
    if args.per_class is not None and args.per_class != len(seeds):
        raise UserError(f"--seeds {args.seeds}: {len(seeds)} seeds for the {args.per_class} pictures of --per-class")
    return [(seed, 0) for seed in seeds]


def seed_list(text: str) -> list[int]:
    """``0-3,9`` as [0, 1, 2, 3, 9]. Raises UserError for anything else, a seed that is there twice, too many."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise UserError(f"--seeds {text}: {part!r} is neither a seed nor a range; write them as 0-7 or 1,5,9")
        options.check(f"--seeds {text}", int(last or first), 0, MOST_SEED)
        options.check(f"--seeds {text}: too many seeds", int(last or first) - int(first), 0, MOST_PICTURES - 1)
        seeds += range(int(first), int(last or first) + 1)
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None) if len(set(seeds)) < len(seeds) else None
    if twice is not None:
        raise UserError(f"--seeds {text}: {twice} is there twice, and would draw one picture twice")
    return seeds


def grid_axes(words: list[str]) -> dict[str, tuple[float, ...]]:
    """``cfg=1,2 top-k=0,100`` as {"cfg": (1, 2), "top-k": (0, 100)}. Raises UserError."""
    axes: dict[str, tuple[float, ...]] = {}
    for word in words:
        option, equals, values = word.partition("=")
        if option not in VARIED or not equals:
            raise UserError(f"--grid-over {word}: give one of {', '.join(VARIED)} with its values, as in cfg=1,2,4")
        try:
            axes[option] = tuple((int if option in WHOLE else float)(value) for value in values.split(","))
        except ValueError:
            raise UserError(f"--grid-over {word}: write numbers with commas between them, as in cfg=1,2,4") from None
        low, high, above = LIMITS[option]
        for value in axes[option]:
            options.check(f"--grid-over {option}={value:g}", value, low, high, above=above)
    if len(axes) < len(words) or len(axes) > 2:
        raise UserError(f"--grid-over {' '.join(words)}: give one or two different options")
    return axes


def draw_new(args: argparse.Namespace, axes: dict[str, tuple[float, ...]], pictures: list[tuple[int, int]]) -> None:
    from llamagen_dist.sampling import drawing, grid
    from llamagen_dist.sampling.load import check_first_tokens
    from llamagen_dist.sampling.pictures import Settings

    for path in filter(None, (args.out, args.film)):
        grid.picture_format(path)
    weights = options.which_weights(args)
    source = drawing.open_source(
        args.checkpoint, weights, args.tokenizer, args.captions, args.text_encoder, quantized=args.quantize
    )
    rows = list(chosen_rows(args, source))
    if axes and len(rows) != 1:
        raise UserError(f"--grid-over: shows one class or caption, and {len(rows)} are given")
    given = {field: getattr(args, name) for name, field in SETTINGS.items() if getattr(args, name) is not None}
    settings = Settings(**{"cfg_scale": 1.0 if source.gpt.config.guidance == "free" else CFG} | given)
    for count in (args.first_tokens, *axes.get("first-tokens", ())):
        check_first_tokens(source.tokenizer, None if count is None else int(count), "--first-tokens")
    wanted = drawing.drawing(source, weights, args.captions, args.text_encoder, rows, pictures, settings, axes)
    passes = drawing.draw_tokens(wanted, source)
    print(drawing.save(args.out, wanted, drawing.page(wanted, source, passes)))
    if args.film is not None:
        film = wanted.model_copy(update={"show": "film"})
        print(drawing.save(args.film, film, drawing.page(film, source, passes)))


def chosen_rows(args: argparse.Namespace, source: "Source") -> Iterator[int]:
    """The label of every row's class, or the number of its caption, as many as a page shows."""
    from llamagen_dist.sampling.grid import shown_classes
    from llamagen_dist.sampling.load import class_number

    count = source.conditions.count
    if args.captions or args.classes == ["all"]:
        rows = list(range(count))
    else:
        rows = list(dict.fromkeys(class_number(name, source.gpt.classes) for name in args.classes))
    shown = shown_classes(rows)
    if len(shown) < len(rows):
        print(f"{len(shown)} of the {len(rows)} rows are drawn, evenly spread: no more fit on a page")
    yield from shown
