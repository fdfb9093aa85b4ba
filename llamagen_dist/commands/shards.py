"""``llamagen shards verify|stats|show|index|merge SHARDS``: look after a folder of shards."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llamagen_dist.commands import options
from llamagen_dist.config import ShardAccess
from llamagen_dist.console import Progress
from llamagen_dist.data.manifest import Manifest, read_manifest
from llamagen_dist.errors import UserError

if TYPE_CHECKING:
    from llamagen_dist.data.shards import Shards


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(text: str, action: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        sub = actions.add_parser(action.__name__.strip("_"), help=text, description=text)
        sub.set_defaults(run=action)
        return sub

    verify = add("read every byte and compare it with the manifest's sha256", _verify)
    stats = add("what the shards hold", _stats)
    show = add("draw a contact sheet: images, or tokens decoded, with their classes and captions", _show)
    for sub in (verify, stats, show):
        sub.add_argument("folder", metavar="SHARDS", help="a folder, http(s)://, s3:// or pipe:COMMAND")
        sub.add_argument("--cache", type=Path, metavar="DIR", help="of remote shards (default: for this call only)")
        sub.add_argument("--cache-gb", type=float, default=50.0, metavar="GB", help="its limit (default: 50)")
        sub.add_argument("--allow-pipe", action="store_true", help="run the COMMAND of pipe:COMMAND")
    show.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png or .jpg")
    show.add_argument("--n", type=int, default=40, metavar="N", help="how many samples (default: 40)")
    show.add_argument("--start", type=int, default=0, metavar="K", help="the first sample (default: 0)")
    show.add_argument("--tokenizer", type=Path, metavar="PATH", help="of token shards (default: the one they name)")
    index = add("make manifest and index for tars of another program", _index)
    index.add_argument("folder", type=Path, metavar="SHARDS")
    index.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line, label 0 first")
    merge = add("put several folders of shards into one, in the order in which they are named", _merge)
    merge.add_argument("folders", type=Path, nargs="+", metavar="SHARDS")
    merge.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="the new folder")
    merge.add_argument("--copy", action="store_true", help="copy the tars (default: hard links where they can be made)")


def run(args: argparse.Namespace) -> None:
    args.run(args)


@contextmanager
def _opened(args: argparse.Namespace) -> "Iterator[Shards]":
    from llamagen_dist.data.shards import open_shards

    options.within(args, "cache-gb", 0, above=True)
    with tempfile.TemporaryDirectory(prefix="llamagen-shards-") as folder:
        cache = args.cache or Path(folder)
        access = ShardAccess(cache=cache, cache_gb=args.cache_gb, allow_pipe=args.allow_pipe)
        yield open_shards(args.folder, access=access)


def _verify(args: argparse.Namespace) -> None:
    from llamagen_dist.data.foreign import verify

    with _opened(args) as shards, Progress("verifying", len(shards)) as progress:
        verify(shards, progress.advance)
    count = len(shards.manifest.shards)
    print(f"{args.folder}: {count} shards, {len(shards):,} samples, every byte as recorded")


def _stats(args: argparse.Namespace) -> None:
    with _opened(args) as shards:
        manifest = shards.manifest
        for key, value in _facts(manifest).items():
            print(f"{key:20} {value}")
        if manifest.classes is not None:
            _histogram(shards.labels(range(len(shards))).tolist(), manifest.classes)


def _facts(manifest: Manifest) -> dict[str, str]:
    size = sum(record.bytes for record in manifest.shards)
    lines = {
        "kind": manifest.kind,
        "samples": f"{manifest.count:,} in {len(manifest.shards)} shards, {size / 1e6:,.1f} MB",
        "members": " ".join(manifest.members),
        "classes": "none" if manifest.classes is None else f"{len(manifest.classes)}",
        "image size": "differs" if manifest.image_size is None else f"{manifest.image_size} px",
        "padding": "none" if manifest.padding is None else f"{manifest.padding} (left, top, right, bottom)",
        "left out": f"{len(manifest.skipped)} unreadable images, {len(manifest.too_small)} too small ones",
        "fingerprint": manifest.fingerprint(),
    }
    if manifest.kind == "tokens" and manifest.grid is not None:
        grid = f"{manifest.grid[0]} x {manifest.grid[1]}"
        counted = f"a row of {manifest.grid[1]}, any first k of which are an image," if manifest.order else grid
        lines["tokens"] = f"{counted} of {manifest.vocab_size} codes"
        lines["crops"] = f"{manifest.crops} per image"
        lines["tokenizer"] = f"{manifest.tokenizer_path} (sha256 {manifest.tokenizer_sha256})"
        if manifest.quantizer is not None:
            lines["quantizer"] = manifest.quantizer
    if (captions := manifest.captions) is not None:
        kinds = "long and short" if captions.short else "long"
        lines["captions"] = f"{kinds}, up to {captions.max_tokens} x {captions.dim} features"
        lines["encoder"] = f"{captions.encoder} (sha256 {captions.encoder_sha256}), cleaned by {captions.cleaning}"
    for key, noticed in manifest.noticed.items():
        if isinstance(noticed, dict):
            noticed = [f"{number:,} {what}" for what, number in noticed.items()]
        lines[key.replace("_", " ")] = "; ".join(noticed) if isinstance(noticed, list) else f"{noticed:,}"
    return lines


def _histogram(labels: list[int], classes: list[str]) -> None:
    counts = [0] * len(classes)
    for label in labels:
        counts[label] += 1
    shown = range(len(classes)) if len(classes) <= 20 else (*range(10), *range(len(classes) - 5, len(classes)))
    for label in shown:
        print(f"  {label:5} {counts[label]:9,}  {classes[label]}")
    if len(classes) > 20:
        print(f"  ({len(classes)} classes, {min(counts):,} to {max(counts):,} samples each)")


def _show(args: argparse.Namespace) -> None:
    from llamagen_dist.sampling.grid import save
    from llamagen_dist.sampling.sheet import shard_sheet

    options.within(args, "n", 1, 1000)
    with _opened(args) as shards:
        if not 0 <= args.start < len(shards):
            raise UserError(f"--start {args.start}: {args.folder} holds samples 0 to {len(shards) - 1}")
        samples = range(args.start, min(args.start + args.n, len(shards)))
        save(args.out, lambda: shard_sheet(shards, samples, args.tokenizer))
    print(args.out)


def _index(args: argparse.Namespace) -> None:
    from llamagen_dist.data.foreign import index_folder

    classes = None
    if args.classes is not None:
        try:
            classes = args.classes.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.classes}: cannot be read ({error})") from None
    with Progress("indexing", len(list(args.folder.glob("*.tar")))) as progress:
        manifest = index_folder(args.folder, classes, progress.advance)
    print(f"{args.folder}: {len(manifest.shards)} shards, {manifest.count:,} samples indexed")
    if ignored := manifest.noticed.get("ignored_files"):
        print(
            f"{ignored:,} files passed over: hidden ones, such as ._ files of AppleDouble, or names without an ending"
        )


def _merge(args: argparse.Namespace) -> None:
    from llamagen_dist.data.foreign import merge

    total = sum(len(read_manifest(folder).shards) for folder in args.folders)
    with Progress("merging", total) as progress:
        manifest = merge(args.folders, args.out, args.copy, progress.advance)
    print(f"{args.out}: {len(manifest.shards)} shards, {manifest.count:,} samples")
