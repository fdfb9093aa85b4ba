"""From a pipeline file to its nodes: the exact programs and configs that will run; nothing is started or written."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llamagen_dist.config import PipelineConfig, Section, StageSection, SweepConfig, load, shrink
from llamagen_dist.config.yaml_text import nest
from llamagen_dist.errors import UserError
from llamagen_dist.launch import points
from llamagen_dist.launch.folder import VARIABLE
from llamagen_dist.launch.graph import Graph, Node, absolute


def plan(file: Path, out: Path, variables: Mapping[str, str] | None = None, small: float = 1.0) -> Graph:
    """Read a pipeline file and fill in every stage.

    variables: replace the file's own (unknown names are errors). small: factor on every training length and
    on the file's ``counts``. Raises UserError for anything a stage would stumble over at once.
    """
    if not 0 < small <= 1:
        raise UserError(f"--small {small}: give a factor above 0 and up to 1, for example 0.05")
    return fill(load(file, kind="pipeline"), file, out, variables, small)


def fill(
    config: PipelineConfig, file: Path, out: Path, variables: Mapping[str, str] | None = None, small: float = 1.0
) -> Graph:
    """``plan`` of a file that has been read."""
    counts = {name: max(1, round(count * small)) for name, count in config.counts.items()}
    known = {**config.variables, **{name: str(count) for name, count in counts.items()}}
    for name in variables or {}:
        if name not in known:
            raise UserError(f"{file}: there is no variable {name!r}; it has {', '.join(sorted(known)) or 'none'}")
    values = {**known, **(variables or {}), "out": str(out)}
    kept = {"variables": {k: values[k] for k in config.variables}, "counts": config.counts}
    nodes: list[Node] = []
    for stage in config.stages:  # every stage waits for the one before it
        nodes.append(_node(stage, file, values, small, out, tuple(node.name for node in nodes[-1:])))
    return Graph("pipeline", config.title, out, tuple(nodes), config.model_copy(update=kept))


def words(settings: Iterable[str]) -> dict[str, str]:
    """``["images=DIR"]`` -> ``{"images": "DIR"}``. Raises UserError for a word without ``=``."""
    pairs = [setting.partition("=") for setting in settings]
    for key, equals, _ in pairs:
        if not equals or not key:
            raise UserError(f"{key!r} is not a setting: write name=value")
    return {key: value for key, _, value in pairs}


def _node(
    stage: StageSection, file: Path, values: Mapping[str, str], small: float, out: Path, after: tuple[str, ...]
) -> Node:
    where = f"{file}: stage {stage.name}"
    if stage.config is not None and stage.arguments:
        raise UserError(f"{where}: give config or arguments, not both")
    config: Section | None = None
    sweep = None
    if stage.config is not None and stage.out is not None:
        below = Path(_substitute(stage.out, values, where)).absolute()
        sweep = points.sweep(file.parent / stage.config, below, _substitute(stage.set, values, where), small)
        config = sweep.config
        if stage.module != sweep.module:
            raise UserError(f"{where}: module is {stage.module}, but {stage.config} is a sweep of {sweep.module}")
    elif stage.config is not None:
        given: Section = load(file.parent / stage.config, nest(_substitute(stage.set, values, where)))
        if isinstance(given, SweepConfig):
            raise UserError(f"{where}: {stage.config} is a sweep: give out, the folder of its points")
        config = absolute(given)
        if small != 1.0:
            config = shrink(config, small)
    elif stage.set:
        raise UserError(f"{where}: set needs config: a YAML file to lay it on")
    images = _substitute(stage.images, values, where)
    if images is not None and not str(images).isdigit():
        images = None  # a share, such as held_out=0.1: how many that is shows when the folder has been read
    return Node(
        name=stage.name,
        folder=out / "stages" / stage.name,
        after=after,
        why=stage.why,
        module=stage.module,
        ranks=stage.ranks,
        nodes=stage.nodes,
        gpus_per_node=stage.gpus_per_node,
        config=config,
        sweep=sweep,
        arguments=tuple(_substitute(stage.arguments, values, where)),
        images=None if images is None else int(images),
        produces=tuple(Path(_substitute(p, values, where)).absolute() for p in stage.produces),
    )


def _substitute(value: Any, values: Mapping[str, str], where: str) -> Any:
    """Replace {name} in strings, at any depth."""
    if isinstance(value, Mapping):
        return {key: _substitute(inner, values, where) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_substitute(inner, values, where) for inner in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(f"{where}: {{{match[1]}}} is not a variable; there are {', '.join(sorted(values))}")
        return values[match[1]]

    return VARIABLE.sub(look_up, value)
