"""init_from: a new run that starts from other weights. What may differ between the two, what may not, and why.

May differ: the classes (rows are kept by name), the image size (no weight depends on the number of tokens), the
dropouts, the layout. An option that adds parameters (models/initial.py, ADDED) may be switched on: they start as in a
fresh run. The optimizer's state is fresh and images_seen is 0. Refused: another tokenizer, another kind of condition,
other sizes, such an option switched off.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamagen_dist.build import fresh_weights, gpt_config
from llamagen_dist.checkpoint import llamagen
from llamagen_dist.checkpoint.checkpoint import Checkpoint
from llamagen_dist.config import GPTConfigFile
from llamagen_dist.data.manifest import MANIFEST, Manifest, read_manifest
from llamagen_dist.errors import UserError
from llamagen_dist.files import read_json, write_text
from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.initial import added_by, is_neutral, options_in
from llamagen_dist.models.sizes import GPTConfig
from llamagen_dist.parallel.tensor_parallel import Source
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.run import Run

LISTED = 20  # classes printed one by one


@dataclass(frozen=True)
class Initial:
    """Where a new run's weights come from. Tensors are read one at a time, so that no rank has to hold the source."""

    source: Checkpoint
    rows: tuple[int, ...] | None
    """The source row of each row of the class table (the null row is the last); None for captions."""
    record: dict[str, Any]
    """What state.json and record.json say of it."""
    fresh: Source
    """What the source lacks (models/initial.py) starts from here."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The full fp32 tensor that the parameter or buffer ``name`` starts from."""
        if name not in self.source.shapes:
            return self.fresh(name, shape)
        tensor = self.source.read(name).float()
        if name == llamagen.CLASSES and self.rows is not None:
            tensor = tensor[list(self.rows)]
        assert tuple(tensor.shape) == tuple(shape), f"{name}: {tuple(tensor.shape)} for {tuple(shape)}"
        return tensor


def initial_weights(
    config: GPTConfigFile, model: GPTConfig, manifest: Manifest, topology: Topology, label: str = "init_from"
) -> Initial | None:
    """What ``config.init_from`` means for a run on the token shards of ``manifest``; None where it is empty.

    Collective: rank 0 verifies the source, and prints what is taken over. A run that has a checkpoint resumes from that
    instead (train_gpt.py). Raises UserError for a source that is missing, damaged or does not fit.
    """
    if config.init_from is None:
        return None
    which = "weights" if config.init_weights == "trained" else config.init_weights
    try:
        return _initial(Checkpoint.open(config.init_from, topology, which), config, model, manifest, topology, label)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None


def _initial(
    source: Checkpoint, config: GPTConfigFile, model: GPTConfig, manifest: Manifest, topology: Topology, label: str
) -> Initial:
    path, folder = source.path, source.folder
    tokenizer, grid = _tokenizer_of(source)
    new = _check(source, tokenizer, model, manifest)
    record: dict[str, Any] = {"path": str(path), "weights_sha256": source.identity}
    if folder is not None:
        record |= {"folder": str(folder), "images_seen": source.state.get("images_seen")}
    classes, rows = "", None
    if model.condition == "class":
        count = source.shapes[llamagen.CLASSES][0] - 1  # the last row is the null class
        names = _class_names(config, source, count)
        rows, classes = class_rows(names, count, manifest.classes, model.num_classes, str(path))
        record["class_rows"] = list(rows)
    before = f"{grid[0]}x{grid[1]}" if grid else "any number of"
    now = f"{manifest.grid[0]}x{manifest.grid[1]}" if manifest.grid else str(model.image_tokens)
    neutral = "".join(f"; {name} is new and starts neutral" for name in new if is_neutral(name))
    topology.log0(
        f"{label}: weights of {folder or path} (sha256 {source.identity[:12]}…), from {before} to {now} tokens per "
        f"image; optimizer and image count start fresh{neutral}{classes}"
    )
    for option in sorted(options_in(new)):
        topology.log0(f"{label}: the parameters of model.{option} are not there and start as in a fresh run")
    return Initial(source, rows, record, fresh_weights(model, config.train.seed))


def _tokenizer_of(source: Checkpoint) -> tuple[str | None, Sequence[int] | None]:
    """(sha256 of the tokenizer, grid of tokens) that the source was trained on, where they are known."""
    tokenizer, grid = (source.state.get("tokenizer") or {}).get("sha256"), source.state.get("grid")
    if tokenizer is None and isinstance(source.config, GPTConfigFile):
        # an older checkpoint, whose state did not name it: its token shards may still be there
        shards = Path(source.config.data.train)
        if (shards / MANIFEST).exists():
            manifest = read_manifest(shards)
            return manifest.tokenizer_sha256, manifest.grid
    return tokenizer, grid


def _check(source: Checkpoint, tokenizer: str | None, model: GPTConfig, manifest: Manifest) -> list[str]:
    """Raises UserError unless the source fits. Returns the parameters that it lacks and that it may lack."""
    path, shapes = source.path, source.shapes
    kind, wanted = llamagen.kind_of(shapes), f"{model.condition}-conditional GPT"
    if kind == "tokenizer":
        raise UserError(f"{path} is a tokenizer; give a GPT's run directory, step folder or weights file")
    if kind != wanted:
        raise UserError(
            f"{path} is a {kind} and this run trains a {wanted}; start from a {wanted}, or leave init_from out"
        )
    codes = shapes["tok_embeddings.weight"][0]
    if codes != model.vocab_size:
        raise UserError(
            f"{path} knows {codes} codes and the token shards of data.train have {model.vocab_size}; extract the "
            "tokens with the tokenizer of those weights"
        )
    if None not in (tokenizer, manifest.tokenizer_sha256) and tokenizer != manifest.tokenizer_sha256:
        raise UserError(
            f"{path} was trained on the codes of another tokenizer (sha256 {str(tokenizer)[:12]}…, the shards of "
            f"data.train: {str(manifest.tokenizer_sha256)[:12]}…); extract the tokens with that one, or, if only its "
            "decoder differs, give the weights as a bare file (llamagen convert)"
        )
    # by building the model: whatever it is made of, names and shapes are compared without a list of them here
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT(model).state_dict().items()}
    if (table := llamagen.CLASSES) in shapes:  # the number of classes may differ
        expected[table] = (shapes[table][0], *expected[table][1:])
    options = options_in(expected) - options_in(shapes)
    new = [name for name in expected if name not in shapes and (is_neutral(name) or added_by(name) in options)]
    known = {name: shape for name, shape in expected.items() if name not in new}
    problem = llamagen.first_difference(shapes, known, "this run's model")
    if problem is not None:
        raise UserError(f"{path}: {problem}; make model.* the source's own sizes")
    if isinstance(source.config, GPTConfigFile):
        theirs = gpt_config(
            source.config.model,
            vocab_size=model.vocab_size,
            image_tokens=model.image_tokens,
            token_rows=model.token_rows,
            num_classes=model.num_classes,
        )
        for key, name in (("n_head", "n_head"), ("n_kv_head", "kv_heads"), ("prefix_rotation", "prefix_rotation")):
            before, now = getattr(theirs, name), getattr(model, name)  # no shape shows these
            if before != now:
                raise UserError(f"{path} has model.{key} {before} and this run {now}; use the source's")
    return new


def _class_names(config: GPTConfigFile, source: Checkpoint, count: int) -> list[str] | None:
    """The names of the source's ``count`` classes: of ``init_classes`` or its own classes.json."""
    if config.init_classes is not None:
        try:
            text = config.init_classes.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"init_classes={config.init_classes} cannot be read ({error})") from None
        names, where = text.rstrip().splitlines(), f"init_classes={config.init_classes}"
    elif source.classes is not None:
        names, where = source.classes, "its classes.json"
    else:
        return None
    if len(names) != count:
        raise UserError(
            f"{source.path} has {count} classes and {where} names {len(names)}; give one name a line, in the "
            "order of its labels"
        )
    return [name.strip() for name in names]


def class_rows(
    old: Sequence[str] | None, old_count: int, new: Sequence[str] | None, new_count: int, source: str
) -> tuple[tuple[int, ...], str]:
    """Which row of the source's class table each row of the new one starts from.

    Rows are kept by name, equal names by their order (ImageNet has two "crane"). A class that the source does not know
    starts as its null row: the model then draws it unconditionally at first, which is far from noise.

    old, new: names of the source's and of this run's classes, label 0 first; None where they are not known.
    old_count, new_count: numbers of classes, without the null class.
    source: what to call the source in a message.

    Returns (source row of each new row, the null row last; what to print about it). Raises UserError where names are
    missing and the counts differ.
    """
    null = old_count
    if old is None or new is None:
        if old_count != new_count:
            raise UserError(
                f"{source} has {old_count} classes, this run {new_count}, and their names are not known; name those "
                "of the source, one a line in the order of its labels, in a file: init_classes=FILE"
            )
        return (*range(new_count), null), f"; the {new_count} classes are kept by number, as names are missing"
    left = defaultdict(list)  # name -> rows of the source that no new class has taken yet
    for row, name in enumerate(old):
        left[name].append(row)
    rows = [left[name].pop(0) if left[name] else null for name in new]
    if rows == list(range(old_count)):
        return (*rows, null), f"; the same {old_count} classes"
    lines = [
        f"  {number} {name}: {'new' if row == null else f'was {row}'}"
        for number, (name, row) in enumerate(zip(new, rows, strict=True))
    ]
    if len(lines) > LISTED:
        lines[LISTED:] = [f"  … and {len(lines) - LISTED} more (all in record.json)"]
    fresh, unused = rows.count(null), sum(map(len, left.values()))
    summary = (
        f"; classes: {new_count - fresh} kept by name, {fresh} new (they start as the null class), {unused} of the "
        "source left out"
    )
    return (*rows, null), "\n".join([summary, *lines])


def note_origin(run: Run, initial: Initial | None, manifest: Manifest) -> None:
    """Let record.json and every checkpoint's state.json say where the weights and the tokens come from."""
    run.origin["tokenizer"] = {"path": manifest.tokenizer_path, "sha256": manifest.tokenizer_sha256}
    run.origin["grid"] = None if manifest.grid is None else list(manifest.grid)
    if manifest.captions is not None:
        run.origin["captions"] = asdict(manifest.captions)
    note_source(run, None if initial is None else initial.record)


def note_source(run: Run, source: dict[str, Any] | None) -> None:
    """What ``init_from`` named, where this start used it, into record.json, and from there into every checkpoint."""
    if run.topology.rank != 0:
        return
    path = run.directory / "record.json"
    record = read_json(path)
    if source is not None:
        record["init_from"] = source
        write_text(path, json.dumps(record, indent=1))
    if "init_from" in record:  # a resume repeats it
        run.origin["init_from"] = record["init_from"]
