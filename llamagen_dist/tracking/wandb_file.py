"""What a ``.wandb`` file says: the log that W&B writes beside (online) or instead of (offline) what it sends.

The container is LevelDB's log (leveldb's doc/log_format.md) behind a header of 7 bytes; the records are protobuf
messages, whose definition W&B ships.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER = 7  # ":W&B", uint16, version
_BLOCK = 32768
_CHUNK = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """The records (wandb_internal_pb2.Record), oldest first; one that a killed writer has left unfinished ends them."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    at, begun = _HEADER, b""
    while True:
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK.size:  # no chunk begins so late in a block
            at += left
            continue
        if at + _CHUNK.size > len(data):
            return
        _, length, kind = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or at + length > len(data):
            return
        begun = data[at : at + length] if kind in (_FULL, _FIRST) else begun + data[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(begun)
            except DecodeError:
                return
            yield record


@dataclass
class Written:
    """What the files of one W&B run hold.

    last_step: of the rows; -1 without any. checkpoints: the aliases of the references. evaluations: the steps of scored
    checkpoints. summary: key -> its last value.
    """

    last_step: int = -1
    checkpoints: set[str] = field(default_factory=set)
    evaluations: set[int] = field(default_factory=set)
    summary: dict[str, Any] = field(default_factory=dict)


def _key(item: Any) -> str:
    return str(item.key or ".".join(item.nested_key))


def written(folder: Path, run: str, offline: bool) -> Written:
    """folder: a run directory. offline: look at what was written instead of sent; else at what was sent."""
    all_of_them = Written()
    for path in sorted(folder.glob(f"wandb/{'offline-run' if offline else 'run'}-*/run-{run}.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                steps, scored = (
                    [int(json.loads(item.value_json)) for item in record.history.item if _key(item) == key]
                    for key in ("_step", "eval/step")
                )
                all_of_them.evaluations |= {*scored}
                all_of_them.last_step = max(all_of_them.last_step, record.history.step.num, *steps)
            elif kind == "artifact":
                all_of_them.checkpoints |= {*record.artifact.aliases}
            elif kind == "summary":
                for item in record.summary.update:
                    all_of_them.summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return all_of_them
