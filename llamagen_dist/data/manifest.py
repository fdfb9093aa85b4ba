"""manifest.json: what a folder of shards holds, and how to tell that it still does.

It is written last, so a folder with a manifest is complete. Nothing in it is executed, and a shard name is a
plain file name: a manifest cannot point outside its own folder.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from llamagen_dist.errors import UserError
from llamagen_dist.files import write_bytes

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardRecord:
    """One tar file. ``layout`` holds (offset, size) per member of the manifest where all records of the shard
    are equally long: sample i of the shard then lies at offset + i * stride. Elsewhere ``index_sha256`` names
    the hash of NAME.index.npy, uint64 [samples, members, 2] of (offset, size), size 0 at offset 0 = that
    sample lacks it.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    stride: int | None = None
    layout: tuple[tuple[int, int], ...] | None = None
    index_sha256: str | None = None


@dataclass(frozen=True)
class CaptionEncoding:
    """How the caption features in token shards were made.

    The member ``.caption.npy`` (and ``.short.npy``, where ``short``) holds them as [L, dim], 1 <= L <= max_tokens,
    without padding: bfloat16 numbers as their bit patterns in uint16, which every reader of .npy files knows.
    """

    encoder: str
    """Path of the text encoder."""
    encoder_sha256: str
    """Over its weights and its tokenizer: equal means equal features."""
    dim: int
    max_tokens: int
    cleaning: str
    """Name of the rules that captions were cleaned by."""
    short: bool = False
    """Whether every sample also has the features of its short caption."""


@dataclass(frozen=True)
class Manifest:
    """The description of one folder of image or token shards."""

    kind: Literal["images", "tokens"]
    count: int
    """Samples in all shards."""
    members: tuple[str, ...]
    """File name endings of a sample's parts, such as ``.png`` and ``.cls``."""
    shards: tuple[ShardRecord, ...]
    classes: list[str] | None = None
    """Class names; label k is ``classes[k]``. None: the samples have no labels."""
    image_size: int | None = None
    """Side of the (square) images in pixels; None where they differ."""
    padding: tuple[int, int, int, int] | None = None
    """Zero pixels added left, top, right and bottom of every original image; None: none."""
    skipped: tuple[str, ...] = ()
    """Source images left out because they could not be read."""
    too_small: tuple[str, ...] = ()
    """Source images left out because their shorter side is below --min-side."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What the shards were made from, with a fingerprint, and the options that decide their bytes."""
    tokenizer_sha256: str | None = None
    tokenizer_path: str | None = None
    quantizer: str | None = None
    """The tokenizer's quantizer with its options, such as ``fsq 8,5,5,5``; None: not noted (then ``vq``)."""
    vocab_size: int | None = None
    grid: tuple[int, int] | None = None
    """(rows, columns) of tokens per image; prefix tokens are one row."""
    order: str | None = None
    """``prefix``: the tokens are no grid but a row, any first k of which are an image; None: raster order."""
    crops: int | None = None
    """Token sequences stored per image, one for each crop or flip."""
    captions: CaptionEncoding | None = None
    """Of token shards that hold caption features. (Image shards with captions have ``.txt`` among their members.)"""
    noticed: Mapping[str, Any] = field(default_factory=dict)
    """What was counted or measured while they were made; unlike ``source`` it decides nothing."""
    format: int = FORMAT

    @property
    def class_count(self) -> int | None:
        """How many classes the labels have; None where there are no labels."""
        return None if self.classes is None else len(self.classes)

    @property
    def num_classes(self) -> int:
        """How many classes the labels have. Raises UserError where there are no labels."""
        if self.classes is None:
            raise UserError("these shards have no class labels, and a class-conditional model needs them")
        return len(self.classes)

    def gpt_sizes(self, location: object) -> dict[str, Any]:
        """What these shards fix of a GPT, as keywords of ``build.gpt_config``.

        location: what to call the shards. Raises UserError where they hold no tokens.
        """
        if self.vocab_size is None or self.grid is None:
            raise UserError(f"{location}: holds {self.kind}, not tokens; name the output of tokenizer_training.extract")
        rows, columns = self.grid
        sizes = {"vocab_size": self.vocab_size, "image_tokens": rows * columns, "num_classes": self.class_count}
        return sizes | ({"token_rows": rows} if self.order == "prefix" else {})

    def fingerprint(self) -> str:
        """sha256 (hex) that changes when any byte of the data does; independent of where it lies."""
        content = [self.kind, self.members, self.classes, [(s.name, s.samples, s.sha256) for s in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, leaving out what is not set. The last file of a folder to be written."""
    content = _set_only(asdict(manifest))
    content["shards"] = [_set_only(asdict(shard)) for shard in manifest.shards]
    write_bytes(folder / MANIFEST, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _set_only(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value not in ((), {})}


def shard_record(data: Mapping[str, Any]) -> ShardRecord:
    """From JSON. Raises KeyError, TypeError or ValueError for anything else than a record."""
    name = data["name"]
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"the shard name {name!r} is not a plain file name")
    layout = data.get("layout")
    record = ShardRecord(
        name=name,
        samples=int(data["samples"]),
        bytes=int(data["bytes"]),
        sha256=str(data["sha256"]),
        stride=None if data.get("stride") is None else int(data["stride"]),
        layout=None if layout is None else tuple((int(offset), int(size)) for offset, size in layout),
        index_sha256=data.get("index_sha256"),
    )
    if record.samples < 0 or (record.layout is None) != (record.stride is None):
        raise ValueError(f"the record of shard {name} does not fit together")
    return record


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError when there is none, or when it is not one of ours."""
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        tars = sorted(folder.glob("*.tar"))
        if not folder.is_dir():
            hint = "the folder does not exist"
        elif tars:
            hint = (
                "an unfinished run left it (run the same command again), or, for shards of another program, "
                f"make one with: llamagen shards index {folder}"
            )
        else:
            hint = "make shards with: llamagen pack SOURCE --out SHARDS"
        raise UserError(f"{folder}: no shards here ({MANIFEST} is missing); {hint}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def parse_manifest(content: bytes, path: str) -> Manifest:
    """The manifest that a file's bytes hold; Raises UserError, naming ``path``, for anything else."""
    try:
        data = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']} is not {FORMAT}, the one this version reads")
        if data["kind"] not in ("images", "tokens"):
            raise ValueError(f"kind {data['kind']!r} is neither images nor tokens")
        known = {f.name for f in fields(Manifest)}
        values = {key: value for key, value in data.items() if key in known}
        values["shards"] = tuple(shard_record(shard) for shard in data["shards"])
        for key in ("members", "padding", "skipped", "too_small", "grid"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        if values.get("captions") is not None:
            values["captions"] = CaptionEncoding(**values["captions"])
        manifest = Manifest(**values)
        if manifest.count != sum(shard.samples for shard in manifest.shards):
            raise ValueError("count is not the sum of the shards' samples")
        for shard in manifest.shards:
            if shard.layout is not None and len(shard.layout) != len(manifest.members):
                raise ValueError(f"the layout of shard {shard.name} does not name every member")
    except (KeyError, TypeError, ValueError) as error:
        what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: not a shard manifest: {what}; make the shards again") from None
    return manifest
