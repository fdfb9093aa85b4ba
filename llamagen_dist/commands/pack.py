"""``llamagen pack SOURCE --out SHARDS``: images become WebDataset shards. Options and ranges are config/pack.py's."""

import argparse
from pathlib import Path

from llamagen_dist.config.pack import PackConfig, PackOptions
from llamagen_dist.config.section import build
from llamagen_dist.console import LOG


def arguments(parser: argparse.ArgumentParser) -> None:
    """An option per field of PackOptions; none has a default here, so that those given can be laid on a file."""
    fields = PackConfig.model_fields
    parser.add_argument("source", help=fields["source"].description)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the same options, as a .yaml file has them")
    parser.add_argument("--out", metavar="SHARDS", help=fields["out"].description)
    for name in PackOptions.model_fields:
        option, text = f"--{name.replace('_', '-')}", (fields[name].description or "").replace("%", "%%")
        if name == "skip_bad":
            parser.add_argument(option, action="store_true", default=None, help=text)
        else:
            parser.add_argument(option, metavar="FILE" if name == "class_map" else "N", help=text)


def run(args: argparse.Namespace) -> None:
    from llamagen_dist.config.loader import load
    from llamagen_dist.config.yaml_text import merge, parse
    from llamagen_dist.data.pack import pack, summary

    names = ("out", *PackOptions.model_fields)
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings = merge(parse(args.settings), given)
    config: PackConfig
    if Path(args.source).suffix in (".yaml", ".yml"):
        config = load(args.source, settings, "pack")
    else:
        config = build(PackConfig, {"kind": "pack", "source": args.source, **settings}, "llamagen pack")
    for name, manifest in pack(config.source, config.out, config).items():
        for line in summary(manifest):
            LOG.info(f"{config.out / name}: {line}")
