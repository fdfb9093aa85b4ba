"""From a sweep file to its points: each one's name, folder and whole config; nothing is started or written."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.config import KINDS, Section, SweepConfig, load, shrink
from llamagen_dist.config.loader import resolve
from llamagen_dist.config.training import grouped
from llamagen_dist.config.yaml_text import merge, nest, parse, read
from llamagen_dist.errors import UserError
from llamagen_dist.launch.graph import Graph, Node, absolute

MOST = 10_000
LONGEST_NAME = 120
_OUR_FILES = frozenset(
    ["code", "lock", "config.yaml", "log", "report", "stages", "checkpoints"]
)  # the last two by reports
_TARGETS = {"run_dir": "", "out": "out"}  # the key that says where a program writes -> below the point's folder
_FIELD = re.compile(r"\{([A-Za-z0-9_.]+)\}")
_ODD = re.compile(r"[^A-Za-z0-9.+]+")


def sweep(file: Path, out: Path, settings: Sequence[str] | Mapping[str, Any] = (), small: float = 1.0) -> Graph:
    """Read a sweep file and fill in every point.

    settings: for all points, ``key=value`` words or dotted keys. small: factor on every training length.
    Raises UserError for anything wrong with the file or with the config of any point (the first one).
    """
    return fill(load(file, kind="sweep"), file, out, settings, small)


def fill(
    config: SweepConfig, file: Path, out: Path, settings: Sequence[str] | Mapping[str, Any] = (), small: float = 1.0
) -> Graph:
    """``sweep`` of a file that has been read."""
    base = file.parent / config.config
    rows = combinations(config, str(file))
    swept = {key for row in rows for key in row.settings}
    below = merge(nest(config.set), nest(settings) if isinstance(settings, Mapping) else parse(settings))
    for word in settings:
        if (key := word.partition("=")[0]) in swept:
            raise UserError(f"{word}: {key} is swept by {file}; change it there")
    names = name_points(rows, config.name, str(file))
    common = merge(read(base), below)
    kind = str(common.get("kind"))
    target_key = next((key for key in _TARGETS if kind in KINDS and key in KINDS[kind].model_fields), None)
    if target_key is None:
        raise UserError(f"{base}: a config of kind {kind} writes into no folder of its own and cannot be swept")
    for key in (target_key, "kind"):
        if key in swept or key in below:
            raise UserError(f"{file}: {key} is set by the sweep itself; leave it out")
    points = []
    for name, row in zip(names, rows, strict=True):
        folder = out / name
        target = folder / _TARGETS[target_key]
        if kind == "evaluate":
            target = folder / "evaluation.json"
        data = merge(merge(common, nest(row.settings)), {target_key: str(target)})
        filled: Section = resolve(grouped(data, out.name), f"{file}: point {name}: {base.name}")
        whole = absolute(filled) if small == 1.0 else shrink(absolute(filled), small)
        points.append(
            Node(
                name=name,
                module=config.module,
                folder=folder,
                ranks=config.ranks,
                nodes=config.nodes,
                gpus_per_node=config.gpus_per_node,
                config=whole,
            )
        )
    kept = config.model_copy(update={"config": base.absolute(), "set": below})
    return Graph("sweep", config.title, out, tuple(points), kept)


@dataclass(frozen=True)
class Row:
    """One point's settings; called: the name its entry of ``list`` has, if any, which stands for the entry's keys."""

    settings: dict[str, Any]
    called: str | None = None
    stood_for: frozenset[str] = frozenset()


def combinations(config: SweepConfig, source: str) -> list[Row]:
    """Every entry of list x every row of zip x every combination of grid, the last key of grid changing fastest."""
    entries = [Row({})]
    if config.list:
        given = config.list.items() if isinstance(config.list, dict) else ((None, entry) for entry in config.list)
        entries = [Row(dict(entry), name, frozenset() if name is None else frozenset(entry)) for name, entry in given]
    rows = [dict(zip(config.zip, values, strict=True)) for values in zip(*config.zip.values(), strict=True)] or [{}]
    count = len(entries) * len(rows) * math.prod(len(values) for values in config.grid.values())
    if count > MOST:
        raise UserError(f"{source}: {count:,} points are more than a sweep may have ({MOST:,}); take values out")
    keys = [("grid", key) for key in config.grid] + [("zip", key) for key in config.zip]
    keys += [("list", key) for key in dict.fromkeys(key for entry in entries for key in entry.settings)]
    for (one, key), (other, clash) in itertools.combinations(keys, 2):
        if one == other == "list":
            continue  # of two points
        if f"{key}.".startswith(f"{clash}.") or f"{clash}.".startswith(f"{key}."):
            raise UserError(f"{source}: {one} sets {key} and {other} sets {clash}: one of them would be lost")
    grid = [dict(zip(config.grid, values, strict=True)) for values in itertools.product(*config.grid.values())]
    return [
        Row({**entry.settings, **row, **combination}, entry.called, entry.stood_for)
        for entry in entries
        for row in rows
        for combination in grid
    ]


def name_points(rows: Sequence[Row], template: str | None, source: str) -> list[str]:
    """A name per point that can be a folder: from the template, else from the keys that differ.

    Raises UserError for names that are the same, too long, or the sweep's own.
    """
    keys = _differing(rows)
    labels = _labels(keys)
    names = []
    for row in rows:
        if template is not None:
            name = _FIELD.sub(lambda match, row=row: _filled(match[1], row, source), template)  # type: ignore[misc]
            name = re.sub(r"[^A-Za-z0-9.+_-]+", "-", name).strip("-")
        else:
            parts = [] if row.called is None else [_word(row.called)]
            parts += [
                f"{labels[key]}-{_word(value)}"
                for key, value in row.settings.items()
                if key in keys and key not in row.stood_for
            ]
            name = "_".join(parts) or "base"
        names.append(name)
    seen: dict[str, Row] = {}
    for name, row in zip(names, rows, strict=True):
        problem = None
        if name in seen:
            problem = f"two points would be called {name!r} ({seen[name].settings} and {row.settings}); give name: …"
        elif len(name) > LONGEST_NAME:
            problem = f"the name {name[:40]}… has {len(name)} characters, more than {LONGEST_NAME}; give name: …"
        elif name in _OUR_FILES or not name.strip(".") or name.startswith("."):
            problem = f"a point cannot be called {name!r}; give another name: …"
        if problem:
            raise UserError(f"{source}: {problem}")
        seen[name] = row
    return names


def _differing(rows: Sequence[Row]) -> tuple[str, ...]:
    """Keys that do not have one value in all points, in the order of the file; all keys of a single point."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    if len(rows) == 1:
        return tuple(keys)
    values = {key: {repr(row.settings[key]) if key in row.settings else "" for row in rows} for key in keys}
    return tuple(key for key in keys if len(values[key]) > 1)


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key, with as many before it as tell it from the others."""
    labels = {}
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            label = ".".join(words[-count:])
            if sum(f".{other}".endswith(f".{label}") for other in keys) == 1:
                break
        labels[key] = label
    return labels


def _filled(key: str, row: Row, source: str) -> str:
    if key not in row.settings:
        raise UserError(f"{source}: name: {{{key}}} is not set by every point; it has {', '.join(row.settings)}")
    return _word(row.settings[key])


def _word(value: Any) -> str:
    """A value as part of a file name: 0.0003 -> 3e-4, [0.9, 0.95] -> 0.9-0.95, a/b -> a-b."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return "-".join(_word(inner) for inner in value) or "none"
    if isinstance(value, Mapping):
        return "-".join(f"{key}-{_word(inner)}" for key, inner in value.items()) or "none"
    return "none" if value is None else _ODD.sub("-", str(value)).strip("-") or "none"


def _number(value: float) -> str:
    """As short as it can be read back: 0.05, 3e-4, 1e6."""
    if not math.isfinite(value) or value == 0 or 1e-2 <= abs(value) < 1e6:
        return repr(value).removesuffix(".0")
    text = next(text for digits in range(17) if float(text := f"{value:.{digits}e}") == value)
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}"
