"""PROGRAM: a captioned data set that package managers can install, the pictures of the emoji-datasource packages.

    npm pack emoji-datasource-google@16.0.0
    python -m examples.emoji emoji-datasource-google-16.0.0.tgz --out DIR      then: llamagen pack DIR/train.jsonl …

Of its 3,786 pictures of 64 x 64 pixels (version 16) those that come in skin tones are kept: 323 people and hands, each
in yellow and in five tones, couples also in pairs of them; 2,198 in all. Held out are *compositions*: of every second
name one tone, so that name and tone are each in the training set, but the caption is not.

``--all`` takes every picture, with its category as class: a colour set for a tokenizer (configs/pipeline/colour.yaml),
3,767 pictures of 10 classes, of which 374 are held out by a hash of the file's name, all tones of an emoji together.
"""

import argparse
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import Any

from PIL import Image

from llamagen_dist.console import LOG
from llamagen_dist.data.decode import DECODE_ERRORS, decode
from llamagen_dist.errors import UserError
from llamagen_dist.files import OutputFolder
from llamagen_dist.program import run as run_program

TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
WHERE = "fetch it with: npm pack emoji-datasource-google@16.0.0"
_LIMIT = 64 << 20  # bytes of one file of the package; the largest are sprite sheets
_LIMIT_OF_ALL = 512 << 20  # of all that are read; they are 10 MB
_MOST_PIXELS = 1 << 20  # of one picture, before it is unpacked; they have 4,096
_HELD_OUT = 0.1  # of the names' hashes, with --all


@dataclass(frozen=True)
class Picture:
    """file: where its pixels are. short: name and skin tone. text: that, and a sentence with the kind of thing.

    category: the class, where there are classes.
    """

    file: str
    short: str
    text: str
    held_out: bool
    category: str | None = None


def prepare_emoji(package: Path, out: Path, every: bool = False) -> tuple[int, int]:
    """Write OUT/train.jsonl, OUT/validation.jsonl and OUT/images/*.png (RGB, on white) for ``llamagen pack``.

    package: the downloaded .tgz, or the folder ``package`` in it.
    every: all pictures, with classes.

    Returns how many pictures are for training and how many are held out. The same package again is left as it is.
    Raises UserError: not such a package, pictures that are not there or cannot be read, ``out`` is something else.
    """
    files = _read(package)
    pictures = _pictures(package, files, every)
    digest = hashlib.sha256()
    for name in ("emoji.json", *(picture.file for picture in pictures)):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    pixels = {picture.file: _on_white(files[picture.file], f"{package}: {picture.file}") for picture in pictures}
    identity: dict[str, Any] = {"made_by": "prepare_emoji", "rules": 1, "package_sha256": digest.hexdigest()}
    if every:
        identity["every"] = True
    output = OutputFolder(out, identity, "made_from.json", what="captioned pictures")
    if output.finished() is None:
        output.begin(path for path in out.glob("*") if path != output.parts)
        (out / "images").mkdir(exist_ok=True)
        for file, image in pixels.items():
            image.save(out / "images" / file)
        for name, held_out in (("train.jsonl", False), ("validation.jsonl", True)):
            lines = [_line(picture) for picture in pictures if picture.held_out == held_out]
            (out / name).write_text("".join(lines), encoding="utf-8")
        output.finish({})
    held = sum(picture.held_out for picture in pictures)
    return len(pictures) - held, held


def _line(picture: Picture) -> str:
    record = {"image_path": f"images/{picture.file}", "text": picture.text, "short": picture.short}
    if picture.category is not None:
        record["class"] = picture.category
    return json.dumps(record, ensure_ascii=False) + "\n"


def _on_white(data: bytes, where: str) -> Image.Image:
    try:
        return decode(data, _MOST_PIXELS, formats=("PNG",))
    except DECODE_ERRORS as error:
        raise UserError(f"{where} cannot be decoded ({error}); {WHERE}") from None


def _read(package: Path) -> dict[str, bytes]:
    """emoji.json and the 64 x 64 pictures of one vendor, by file name."""
    files, total = {}, 0
    try:
        for path, data in _files(package):
            parts, total = path.split("/"), total + len(data)
            if total > _LIMIT_OF_ALL:
                raise UserError(f"{package}: its small pictures hold more than {_LIMIT_OF_ALL >> 20} MiB; {WHERE}")
            if path == "emoji.json" or (len(parts) == 4 and parts[0] == "img" and parts[2] == "64"):
                files[parts[-1]] = data
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{package}: cannot be read ({error}); {WHERE}") from None
    if "emoji.json" not in files:
        raise UserError(f"{package}: is not an emoji-datasource package (no emoji.json in it); {WHERE}")
    return files


def _files(package: Path) -> Iterator[tuple[str, bytes]]:
    """(path inside the package, content) of its small files."""
    if package.is_dir():
        for path in (package / "emoji.json", *sorted(package.glob("img/*/64/*.png"))):
            if path.is_file():
                yield path.relative_to(package).as_posix(), path.read_bytes()
        return
    with tarfile.open(package, "r:*") as tar:
        for member in tar:
            inside = member.name.removeprefix("package/")
            if member.isfile() and member.size <= _LIMIT and (inside == "emoji.json" or "/64/" in inside):
                file = tar.extractfile(member)
                assert file is not None
                yield inside, file.read()


def _pictures(package: Path, files: dict[str, bytes], every: bool) -> list[Picture]:
    try:
        entries = [entry for entry in json.loads(files["emoji.json"]) if every or entry.get("skin_variations")]
        pictures = [picture for e in sorted(entries, key=itemgetter("image")) for picture in _of_entry(e, every)]
        names = sorted({entry["name"].lower() for entry in entries})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{package}: its emoji.json is not as expected ({error!r}); {WHERE}") from None
    pictures = [picture for picture in pictures if picture.file in files]
    if every:  # some flags are one picture byte for byte, which would be in both sets
        pictures = list({files[picture.file]: picture for picture in reversed(pictures)}.values())[::-1]
    else:
        apart = {_short(name, [tone]) for name, tone in zip(names[::2], cycle(TONES), strict=False)}
        pictures = [Picture(p.file, p.short, p.text, p.short in apart) for p in pictures]
    if not any(p.held_out for p in pictures) or all(p.held_out for p in pictures):
        raise UserError(f"{package}: holds {len(pictures)} of the pictures that its emoji.json names; {WHERE}")
    return pictures


def _of_entry(entry: dict[str, Any], every: bool) -> Iterator[Picture]:
    """One emoji and its skin tones, which with ``every`` are on one side of the split."""
    kind = entry["subcategory"].replace("-", " ")
    held_out = every and hashlib.sha256(entry["image"].encode()).digest()[0] < _HELD_OUT * 256
    for tones, drawn in {"": entry, **entry.get("skin_variations", {})}.items():
        short = _short(entry["name"].lower(), tones.split("-") if tones else [])
        file = str(drawn["image"])
        if "/" not in file and file.endswith(".png"):
            yield Picture(file, short, f"{short}. {kind}.", held_out, str(entry["category"]) if every else None)


def _short(name: str, tones: list[str]) -> str:
    words = " and ".join(dict.fromkeys(TONES[tone] for tone in tones))
    return f"{name} with {words} skin" if tones else name


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.emoji", description="Captioned pictures to be packed.")
    parser.add_argument("package", type=Path, help=f"the downloaded .tgz, or its unpacked folder; {WHERE}")
    parser.add_argument("--all", action="store_true", help="every picture, with its category as class")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for .jsonl files and images")
    args = parser.parse_args(argv)
    train, held_out = prepare_emoji(args.package, args.out, args.all)
    LOG.info(
        f"{args.out}: {train:,} captioned pictures in train.jsonl, {held_out:,} with other captions in validation.jsonl"
    )


if __name__ == "__main__":
    run_program(main)
