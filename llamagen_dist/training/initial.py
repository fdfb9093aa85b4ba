"""init_from: a new run that starts from other weights. What may differ between the two, what may not, and why.

May differ: the classes (rows are kept by name), the image size (no weight depends on the number of tokens), the
dropouts, the layout. The optimizer's state is fresh and images_seen is 0. Refused: another tokenizer, another kind of
condition, other sizes.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.checkpoint import released, store
from llamagen_dist.config import GPTConfigFile, load
from llamagen_dist.data.manifest import MANIFEST, Manifest, read_manifest
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text
from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.sizes import GPT_SIZES, GPTConfig
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.run import Run

LISTED = 20  # classes printed one by one


@dataclass(frozen=True)
class Initial:
    """Where a new run's weights come from. Tensors are read one at a time, so that no rank has to hold the source."""

    weights: store.Weights
    rows: tuple[int, ...] | None
    """The source row of each row of the class table (the null row is the last); None for captions."""
    record: dict[str, Any]
    """What state.json and record.json say of it."""

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The full fp32 tensor that the parameter or buffer ``name`` starts from."""
        found = self.weights.read(name).float()
        if name == released.CLASSES and self.rows is not None:
            found = found[list(self.rows)]
        assert tuple(found.shape) == tuple(shape), f"{name}: {tuple(found.shape)} for {tuple(shape)}"
        return found


def initial_weights(
    config: GPTConfigFile, model: GPTConfig, manifest: Manifest, topology: Topology, label: str = "init_from"
) -> Initial | None:
    """What ``config.init_from`` means for a run on the token shards of ``manifest``; None: nothing, or a resume.

    Collective: rank 0 verifies the source, and prints what is taken over. A run that has a checkpoint goes on from
    that, whatever ``init_from`` says. Raises UserError for a source that is missing, damaged or does not fit.
    """
    if (
        config.init_from is None
        or topology.broadcast_from_rank0(lambda: store.newest(config.run_dir, warn=False)) is not None
    ):
        return None
    try:
        return _initial(config.init_from, config, model, manifest, topology, label)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None


def _initial(
    path: Path, config: GPTConfigFile, model: GPTConfig, manifest: Manifest, topology: Topology, label: str
) -> Initial:
    sha256, folder = topology.broadcast_from_rank0(lambda: _identity(path))
    weights = store.open_weights(folder or path, verified=False)
    source = _Source(path, folder, weights)
    _check(source, config, model, manifest)
    record: dict[str, Any] = {"path": str(path), "weights_sha256": sha256}
    if folder is not None:
        record |= {"folder": str(folder), "images_seen": source.state.get("images_seen")}
    told, rows = "", None
    if model.condition == "class":
        old = _source_classes(config, source)
        rows, told = class_rows(old, source.classes, manifest.classes, model.num_classes, str(path))
        record["class_rows"] = list(rows)
    was = f"{source.grid[0]}x{source.grid[1]}" if source.grid else "any number of"
    now = f"{manifest.grid[0]}x{manifest.grid[1]}" if manifest.grid else str(model.image_tokens)
    topology.log0(
        f"{label}: weights of {folder or path} (sha256 {sha256[:12]}…), from {was} to {now} tokens per image, on which "
        f"no weight depends; optimizer and image count start fresh{told}"
    )
    return Initial(weights, rows, record)


def _identity(path: Path) -> tuple[str, Path | None]:
    weights = store.open_weights(path)
    return store.identity_of(weights.read_all()), weights.folder


class _Source:
    """The weights and what is known of their run: nothing for a bare file."""

    def __init__(self, path: Path, folder: Path | None, weights: store.Weights) -> None:
        self.path, self.folder, self.shapes = path, folder, weights.shapes
        self.state: dict[str, Any] = {}
        self.config: GPTConfigFile | None = None
        self.tokenizer: str | None = None
        self.grid: tuple[int, ...] | None = None
        if folder is None:
            return
        self.state = store.read_state(folder)
        config = load(folder / "config.yaml")
        self.config = config if isinstance(config, GPTConfigFile) else None
        self.tokenizer, self.grid = (self.state.get("tokenizer") or {}).get("sha256"), self.state.get("grid")
        if (
            self.config is not None and self.tokenizer is None
        ):  # an older checkpoint: its token shards may still be there
            shards = self.config.data.train
            if (Path(shards) / MANIFEST).exists():
                manifest = read_manifest(Path(shards))
                self.tokenizer, self.grid = manifest.tokenizer_sha256, manifest.grid

    @property
    def classes(self) -> int:
        """How many, the null class not counted."""
        return self.shapes[released.CLASSES][0] - 1


def _check(source: _Source, config: GPTConfigFile, model: GPTConfig, manifest: Manifest) -> None:
    path, shapes = source.path, source.shapes
    kind, wanted = released.kind_of(shapes), f"{model.condition}-conditional GPT"
    if kind == "tokenizer":
        raise UserError(f"{path} is a tokenizer; give a GPT's run directory, step folder or weights file")
    if kind != wanted:
        raise UserError(
            f"{path} is a {kind} and this run trains a {wanted}: the condition of one means nothing to the other; "
            f"start from a {wanted}, or leave init_from out"
        )
    codes = shapes["tok_embeddings.weight"][0]
    if codes != model.vocab_size:
        raise UserError(
            f"{path} knows {codes} codes and the token shards of data.train have {model.vocab_size}: another "
            "tokenizer, whose codes mean other things; extract the tokens with the tokenizer of those weights"
        )
    if None not in (source.tokenizer, manifest.tokenizer_sha256) and source.tokenizer != manifest.tokenizer_sha256:
        raise UserError(
            f"{path} was trained on the codes of another tokenizer (sha256 {str(source.tokenizer)[:12]}…, the shards "
            f"of data.train: {str(manifest.tokenizer_sha256)[:12]}…), so the same numbers mean other things; extract "
            "the tokens with that tokenizer, or, if only its decoder differs, give the weights as a bare file "
            "(llamagen convert)"
        )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT(model).state_dict().items()}
    rows = released.CLASSES
    if rows in shapes:  # the number of classes may differ
        expected[rows] = (shapes[rows][0], *expected[rows][1:])
    problem = released.first_difference(shapes, expected, "this run's model")
    if problem is not None:
        raise UserError(f"{path}: {problem}; make model.* the source's own sizes")
    if source.config is not None:
        for key in ("n_head", "n_kv_head", "prefix_rotation"):  # what no shape shows
            theirs, ours = _model_key(source.config, key), _model_key(config, key)
            if theirs != ours:
                raise UserError(f"{path} has model.{key} {theirs} and this run {ours}: the weights mean other things")


def _model_key(config: GPTConfigFile, key: str) -> Any:
    section = config.model
    if key == "n_kv_head":
        return section.n_kv_head or _model_key(config, "n_head")
    if key == "n_head" and section.size is not None:
        return GPT_SIZES[section.size]["n_head"]
    return getattr(section, key)


def _source_classes(config: GPTConfigFile, source: _Source) -> list[str] | None:
    """The source's class names: of ``init_classes`` or its own classes.json."""
    if config.init_classes is not None:
        try:
            text = config.init_classes.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"init_classes={config.init_classes} cannot be read ({error})") from None
        names, where = text.rstrip().splitlines(), f"init_classes={config.init_classes}"
    elif source.folder is not None and (source.folder / "classes.json").exists():
        names, where = json.loads((source.folder / "classes.json").read_text(encoding="utf-8")), "its classes.json"
    else:
        return None
    if len(names) != source.classes:
        raise UserError(
            f"{source.path} has {source.classes} classes and {where} names {len(names)}; give one name a line, in the "
            "order of its labels"
        )
    return [str(name).strip() for name in names]


def class_rows(
    old: Sequence[str] | None, old_count: int, new: Sequence[str] | None, new_count: int, source: str
) -> tuple[tuple[int, ...], str]:
    """(source row of each new row with the null row last, what to print about it).

    Rows are kept by name, equal names by their order (ImageNet has two "crane"). A class that the source does not know
    starts as its null row: the model then paints it unconditionally at first, which is far from noise. Raises UserError
    where names are missing and the counts differ.
    """
    null = old_count
    if old is None or new is None:
        if old_count != new_count:
            raise UserError(
                f"{source} has {old_count} classes, this run {new_count}, and their names are not known; name those "
                "of the source, one a line in the order of its labels, in a file: init_classes=FILE"
            )
        told = f"; the {new_count} classes are kept by number, as their names are not known on both sides"
        return (*range(new_count), null), told
    places = defaultdict(list)
    for number, name in enumerate(old):
        places[name].append(number)
    rows = [places[name].pop(0) if places[name] else null for name in new]
    fresh = [name for name, row in zip(new, rows, strict=True) if row == null]
    unused = sum(len(left) for left in places.values())
    lines = [
        f"  {number} {name}: {'new' if row == null else f'was {row}'}"
        for number, (name, row) in enumerate(zip(new, rows, strict=True))
    ]
    if rows == list(range(old_count)):
        return (*rows, null), f"; the same {old_count} classes"
    more = [f"  … and {len(lines) - LISTED} more (all in record.json)"] if len(lines) > LISTED else []
    told = (
        f"; classes: {new_count - len(fresh)} kept by name, {len(fresh)} new (they start as the null class), {unused} "
        "of the source left out\n"
    )
    return (*rows, null), told + "\n".join(lines[:LISTED] + more)


def note_origin(run: Run, initial: Initial | None, manifest: Manifest) -> None:
    """Let record.json and every checkpoint's state.json say where the weights and the tokens come from."""
    run.origin["tokenizer"] = {"path": manifest.tokenizer_path, "sha256": manifest.tokenizer_sha256}
    run.origin["grid"] = None if manifest.grid is None else list(manifest.grid)
    if manifest.captions is not None:
        run.origin["captions"] = asdict(manifest.captions)
    if run.topology.rank != 0:
        return
    path = run.directory / "record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    if initial is not None:
        record["init_from"] = initial.record
        write_text(path, json.dumps(record, indent=1))
    if "init_from" in record:  # a resume repeats it
        run.origin["init_from"] = record["init_from"]
