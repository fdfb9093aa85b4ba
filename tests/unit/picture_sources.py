"""Sources of pictures for the packing tests: files of every kind that are kept, captions, tars of other tools."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamagen_dist.data.foreign import verify
from llamagen_dist.data.manifest import read_manifest
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError

APPLE = b"\0\5\x16\7" + b"\0" * 60  # how an AppleDouble file begins


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (24, 20), mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write(path, data: bytes = b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or encoded(sum(path.name.encode()), "PNG"))
    return path


def packed(source, out, capsys=None, **options):
    """(labels by picture, manifest, what was printed)."""
    manifest = pack(str(source), out, PackOptions(**options))[""]
    shards = open_shards(out)
    labels = shards.labels(range(len(shards))) if manifest.classes else [None] * len(shards)
    by_picture = {shards.image_bytes(n): label for n, label in enumerate(labels)}
    assert read_manifest(out).noticed == manifest.noticed
    return by_picture, manifest, capsys.readouterr().out if capsys else ""


def tar_bytes(entries: list[tuple[str | bytes, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(folder) -> list[dict[str, bytes]]:
    """Every sample's parts, in an order that does not depend on the shuffling."""
    shards = open_shards(folder)
    verify(shards)
    found = [{part: shards.read(n, part) for part in shards.parts(n)} for n in range(len(shards))]
    return sorted(found, key=lambda parts: sorted(parts.items()))


def one_sentence(source, out, **options) -> str:
    with pytest.raises(UserError) as caught:
        pack(str(source), out, PackOptions(**options))
    assert "\n" not in str(caught.value)
    assert not (out / "manifest.json").exists()
    return str(caught.value)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def captioned(folder: Path) -> Path:
    """pairs/set.jsonl: three formats, one caption, two captions, a list of three."""
    (folder / "img").mkdir(parents=True)
    lines = []
    for n, (kind, more) in enumerate(
        [
            ("JPEG", {"text": "a grey cat"}),
            ("PNG", {"text": "ein Kätzchen, das schläft", "short": "Kätzchen"}),
            ("WEBP", {"text": ["a dog", "a dog that runs over a lawn", "a dog that runs"]}),
            ("JPEG", {"caption": "two birds"}),
        ]
    ):
        (folder / "img" / f"{n}.bin").write_bytes(encoded(n, kind))
        lines.append(json.dumps({"image_path": f"img/{n}.bin", **more}, ensure_ascii=n % 2 == 0))
    (folder / "set.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n", encoding="utf-8")
    return folder / "set.jsonl"


def foreign(folder: Path) -> Path:
    """Two tars of another tool: classes as numbers, captions in .txt and .json, a mask beside an image."""
    folder.mkdir()
    a = [("n/0.JPG", encoded(0)), ("n/0.cls", b"1\n"), ("n/0.txt", b"first")]
    a += [("n/1.seg.png", encoded(9, "PNG")), ("n/1.png", encoded(1, "PNG")), ("n/1.cls", b"0"), ("n/1.txt", b"second")]
    b = [("n/0.webp", encoded(2, "WEBP")), ("n/0.cls", b"1"), ("n/0.json", b'{"caption": "third, long", "short": "3"}')]
    (folder / "a.tar").write_bytes(tar_bytes(a))
    (folder / "b.tar").write_bytes(tar_bytes(b))
    return folder


def imagenet(folder: Path) -> Path:
    """train.tar holding n02.tar and n01.tar, as ImageNet's training set comes."""
    inner = {
        "n02": [("n02_1.JPEG", encoded(1)), ("notes.txt", b"no image"), ("n02_0.JPEG", encoded(2))],
        "n01": [("n01_9.JPEG", encoded(3))],
    }
    path = folder / "train.tar"
    path.write_bytes(tar_bytes([(f"{name}.tar", tar_bytes(entries)) for name, entries in inner.items()]))
    return path


def mixed(folder: Path) -> Path:
    """One class, every format that is kept, a bitmap, a transparent picture and small ones."""
    folder = folder / "thing"
    folder.mkdir(parents=True)
    for n, kind in enumerate(("JPEG", "PNG", "WEBP", "BMP")):
        (folder / f"{n}.{kind.lower()}").write_bytes(encoded(n, kind))
    (folder / "wrong.png").write_bytes(encoded(7, "JPEG"))  # a JPEG by another name
    clear = Image.new("RGBA", (24, 20), (200, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 12, 20))
    clear.save(folder / "clear.png")
    (folder / "low.png").write_bytes(encoded(8, "PNG", (40, 9)))
    return folder.parent
