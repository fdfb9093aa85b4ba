"""Where packed images come from. ``open_source`` tells the kinds apart by what it is given."""

import glob
from pathlib import Path

import numpy as np

from llamagen_dist.data import fashion_mnist
from llamagen_dist.data.manifest import MANIFEST
from llamagen_dist.data.sources.arrays import ArraySource, npz_source
from llamagen_dist.data.sources.classes import ClassMap
from llamagen_dist.data.sources.folder import FolderSource
from llamagen_dist.data.sources.jsonl import JsonlSource
from llamagen_dist.data.sources.source import Caption, Source
from llamagen_dist.data.sources.tars import class_tars, holds_tars, webdataset
from llamagen_dist.errors import UserError

__all__ = ["Caption", "ClassMap", "Source", "open_source"]


def open_source(source: str, class_map: ClassMap | None = None) -> Source:
    """``builtin:fashion-mnist``, a folder with one sub-folder per class, an .npz file, a .jsonl file, a folder or a
    glob of WebDataset tars, one such tar, or a tar that holds one tar per class.

    class_map: which labels the classes get, and their names. Raises UserError for anything else, or without images.
    """
    if source.startswith("builtin:"):
        if source != f"builtin:{fashion_mnist.NAME}":
            raise UserError(f"{source}: unknown; the one embedded data set is builtin:{fashion_mnist.NAME}")
        pixels, labels = fashion_mnist.load()
        classes = list(fashion_mnist.CLASSES)
        if class_map is not None:
            labels, classes = class_map.numbers(labels.astype(np.int64), source)
        return ArraySource(source, fashion_mnist.SHA256, pixels, labels, classes)
    path = Path(source)
    if path.is_dir():
        if shards := sorted(found.parent.name for found in path.glob(f"*/{MANIFEST}")):
            raise UserError(f"{source}: holds folders of shards ({', '.join(shards)}); name one of them")
        tars = sorted(path.glob("*.tar"))
        if tars and any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError(
                f"{source}: holds both tar files and folders; name the tars as '{source}/*.tar', or move them "
                "elsewhere to pack the class folders"
            )
        return webdataset(source, tars, class_map) if tars else FolderSource(path, class_map)
    if path.is_file() and path.suffix == ".npz":
        return npz_source(path, class_map)
    if path.is_file() and path.suffix == ".jsonl":
        return JsonlSource(path, class_map)
    if path.is_file() and path.suffix == ".tar":
        return class_tars(path, class_map) if holds_tars(path) else webdataset(source, [path], class_map)
    if not path.exists() and glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(source))
        if found and all(name.suffix == ".tar" for name in found):
            return webdataset(source, found, class_map)
        raise UserError(
            f"{source}: {'matches other files than tars' if found else 'matches no file'}; give a pattern for "
            "WebDataset tars, such as 'data/*.tar'"
        )
    what = "not a folder or a file of a known kind" if path.exists() else "no such folder or file"
    raise UserError(
        f"{source}: {what}; give a folder with one sub-folder per class, a folder or a pattern of WebDataset tars, a "
        f".jsonl, .npz or .tar file, or builtin:{fashion_mnist.NAME}"
    )
