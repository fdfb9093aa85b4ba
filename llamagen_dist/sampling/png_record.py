"""How a picture was made, inside its PNG: a JSON text with a digest that notices a change of it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from llamagen_dist.errors import UserError

KEYWORD = "llamagen"  # of the PNG's iTXt chunk


def pixels_sha256(picture: Image.Image) -> str:
    """sha256 (hex) of the mode, the size and every pixel; of nothing that a file has beside them."""
    return hashlib.sha256(f"{picture.mode}|{picture.size}|".encode() + picture.tobytes()).hexdigest()


def record_text(record: Mapping[str, Any]) -> PngInfo:
    """What ``Image.save(…, pnginfo=)`` takes, with the record as JSON and its digest."""
    text = PngInfo()
    content = json.dumps({"sha256": _digest(record), "record": record}, ensure_ascii=False, allow_nan=False)
    text.add_itxt(KEYWORD, content)
    return text


def read_record(path: Path) -> tuple[dict[str, Any], str]:
    """(the record, ``pixels_sha256`` of the picture as it is now).

    Raises UserError: no such picture, none with a record, one whose record was changed or damaged.
    """
    try:
        with Image.open(path) as picture:
            texts = picture.text if isinstance(picture, PngImageFile) else {}
            pixels = pixels_sha256(picture)
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # pillow's, for what is no picture or a damaged one
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
    if KEYWORD not in texts:
        raise UserError(
            f"{path}: does not say how it was made; only a .png from llamagen generate does, until another program "
            "writes it again"
        )
    try:
        content = json.loads(texts[KEYWORD])
        record, digest = content["record"], content["sha256"]
        intact = isinstance(record, dict) and _digest(record) == digest
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise UserError(
            f"{path}: what it says of how it was made was changed or damaged since (the digest differs), so it is not "
            "believed; take an intact copy"
        )
    return record, pixels


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()
