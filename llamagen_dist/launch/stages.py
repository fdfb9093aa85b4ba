"""From a pipeline file to the exact programs and configs that will run; nothing is started or written."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamagen_dist.config import PipelineConfig, Section, StageSection, SweepConfig, difference, dump, load, shrink
from llamagen_dist.config.yaml_text import nest
from llamagen_dist.errors import UserError

if TYPE_CHECKING:
    from llamagen_dist.launch.points import Sweep

_NAME = re.compile(r"\{([a-z_][a-z0-9_]*)\}")


@dataclass(frozen=True)
class Stage:
    """One stage, everything filled in. With a config, that file's path becomes its first argument."""

    name: str
    why: str
    module: str
    ranks: int
    arguments: tuple[str, ...] = ()
    config: Section | None = None
    produces: tuple[Path, ...] = ()
    images: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    sweep: "Sweep | None" = None
    """A stage of many points; config is then the sweep's, and each point is trained as it says."""

    def identity(self) -> dict[str, Any]:
        """What decides the stage's result; the number of ranks does not (runs resume on any layout)."""
        return {
            "module": self.module,
            "arguments": list(self.arguments),
            "config": None if self.config is None else dump(self.config),
        }

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def differs_from(self, earlier: Mapping[str, Any], config_file: Path) -> list[str]:
        """What changed since it was started with ``earlier`` (an identity), as ``key: old -> new`` lines."""
        mine = self.identity()
        lines = [
            f"{key}: {earlier[key]} -> {mine[key]}" for key in ("module", "arguments") if earlier[key] != mine[key]
        ]
        if earlier["config"] != mine["config"]:
            if self.config is None or earlier["config"] is None:
                lines.append("config: " + ("added" if earlier["config"] is None else "taken away"))
            else:
                lines += difference(load(config_file), self.config) or ["config: written by another version"]
        return lines


@dataclass(frozen=True)
class Plan:
    title: str
    out: Path
    config: PipelineConfig
    stages: tuple[Stage, ...]


def plan(file: Path, out: Path, variables: Mapping[str, str] | None = None, small: float = 1.0) -> Plan:
    """Read a pipeline file and fill in every stage.

    variables: replace the file's own (unknown names are errors). small: factor on every training length and
    on the file's ``counts``. Raises UserError for anything a stage would stumble over at once.
    """
    if not 0 < small <= 1:
        raise UserError(f"--small {small}: give a factor above 0 and up to 1, for example 0.05")
    config: PipelineConfig = load(file, kind="pipeline")
    counts = {name: max(1, round(count * small)) for name, count in config.counts.items()}
    known = {**config.variables, **{name: str(count) for name, count in counts.items()}}
    for name in variables or {}:
        if name not in known:
            raise UserError(f"{file}: there is no variable {name!r}; it has {', '.join(sorted(known)) or 'none'}")
    values = {**known, **(variables or {}), "out": str(out)}
    kept = {"variables": {k: values[k] for k in config.variables}, "counts": config.counts}
    stages = tuple(_fill(stage, file, values, small) for stage in config.stages)
    return Plan(config.title, out, config.model_copy(update=kept), stages)


def words(settings: Iterable[str]) -> dict[str, str]:
    """``["images=DIR"]`` -> ``{"images": "DIR"}``. Raises UserError for a word without ``=``."""
    pairs = [setting.partition("=") for setting in settings]
    for key, equals, _ in pairs:
        if not equals or not key:
            raise UserError(f"{key!r} is not a setting: write name=value")
    return {key: value for key, _, value in pairs}


def _fill(stage: StageSection, file: Path, values: Mapping[str, str], small: float) -> Stage:
    where = f"{file}: stage {stage.name}"
    if stage.config is not None and stage.arguments:
        raise UserError(f"{where}: give config or arguments, not both")
    config: Section | None = None
    sweep = None
    if stage.config is not None and stage.out is not None:
        from llamagen_dist.launch import points  # which makes stages of its points

        out = Path(_substitute(stage.out, values, where)).absolute()
        sweep = points.sweep(file.parent / stage.config, out, _substitute(stage.set, values, where), small)
        config = sweep.config
        if stage.module != config.module:
            raise UserError(f"{where}: module is {stage.module}, but {stage.config} is a sweep of {config.module}")
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
    return Stage(
        name=stage.name,
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
            raise UserError(f"{where}: {{{match[1]}}} is no variable; there are {', '.join(sorted(values))}")
        return values[match[1]]

    return _NAME.sub(look_up, value)


def absolute(config: Section) -> Section:
    """The same config with every path absolute: jobs run in the snapshot, not where the command was typed."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, tuple):
            return tuple(walk(inner) for inner in value)
        return value.absolute() if isinstance(value, Path) else value

    return type(config).model_validate(walk(config.model_dump()))
