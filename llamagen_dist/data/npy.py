"""The header of an .npy file, read without evaluating it and without numpy's own limits and warnings."""

import ast
from functools import lru_cache

MAGIC = b"\x93NUMPY\x01\x00"
_LONGEST = 1024  # bytes of a header; numpy writes 128 for the arrays of shards


def header_size(data: bytes | bytearray) -> int:
    """Bytes before the numbers, by the first ten bytes of a file of format 1.0; whatever they hold."""
    return 10 + int.from_bytes(data[8:10], "little")


@lru_cache(maxsize=4096)  # the captions of a set have one header per length
def shape_of(header: bytes, dtype: str) -> tuple[int, ...] | None:
    """The shape that a whole header states; None where it is none of a C-ordered array of that type.

    dtype: as numpy writes it, for example ``<u2``.
    """
    if header[:8] != MAGIC or len(header) != header_size(header) or len(header) > _LONGEST:
        return None
    try:
        fields = ast.literal_eval(header[10:].decode("latin-1"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        return None
    shape = fields["shape"]
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        return None
    return shape if fields["descr"] == dtype and fields["fortran_order"] is False else None
