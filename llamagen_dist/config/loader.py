"""load() and dump(): YAML files merged left to right, then ``key=value``; every error at once, in plain words."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from llamagen_dist.config.cluster import ClusterConfig
from llamagen_dist.config.evaluation import EvaluateConfig
from llamagen_dist.config.sampling import ReconstructConfig, SampleConfig
from llamagen_dist.config.section import Section, scaled_keys
from llamagen_dist.config.sections import (
    ExtractConfig,
    GPTConfigFile,
    PipelineConfig,
    TokenizerConfigFile,
)
from llamagen_dist.config.sweep import SweepConfig
from llamagen_dist.errors import UserError

KINDS: dict[str, type[Section]] = {
    "gpt": GPTConfigFile,
    "tokenizer": TokenizerConfigFile,
    "extract": ExtractConfig,
    "pipeline": PipelineConfig,
    "sample": SampleConfig,
    "reconstruct": ReconstructConfig,
    "evaluate": EvaluateConfig,
    "cluster": ClusterConfig,
    "sweep": SweepConfig,
}
S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML as people read it: 1e-4 is a number, 012 is twelve, on/off/yes/no are words, a key appears once."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:bool")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config file is a mapping of keys to values, not {type(data).__name__}")
    return data


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, mapping by mapping; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def read(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file laid on its ``base``, unchecked: for whoever makes many configs of it. Raises UserError."""
    path = path.resolve()
    if path in chain:
        raise UserError(f"{chain[-1]}: base: {path} inherits from itself")
    data = _read(path)
    base = data.pop("base", None)
    if base is None:
        return data
    return merge(read(path.parent / str(base), (*chain, path)), data)


def parse(overrides: Iterable[str]) -> dict[str, Any]:
    """``["optim.lr=1e-4"]`` -> ``{"optim": {"lr": 1e-4}}``; values are read as YAML.

    Raises UserError for a word without ``=``.
    """
    nested: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
            raise UserError(f"{word!r} is not a setting: write key=value, for example optim.lr=1e-4")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            value = text
        nested = merge(nested, nest({key: value}))
    return nested


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``, merging keys that share a prefix."""
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def _fields_at(section: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys allowed where ``location`` points (its last element being the offending key)."""
    current: Any = section
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        if field is None:
            return []
        current = field.annotation
        while not (isinstance(current, type) and issubclass(current, BaseModel)):
            inner = [
                a for a in get_args(current) if get_origin(a) or (isinstance(a, type) and issubclass(a, BaseModel))
            ]
            if not inner:
                return []
            current = inner[0]
    return list(current.model_fields)


def _every_key(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _every_key(field.annotation, f"{prefix}{name}.")
    return keys


def _explain(error: ValidationError, section: type[Section], source: str) -> UserError:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(the whole file)"
        if item["type"] == "extra_forbidden":
            allowed, key = _fields_at(section, item["loc"]), str(item["loc"][-1])
            near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
            elsewhere = [name for name in _every_key(section) if name.split(".")[-1] == key]
            if elsewhere:
                hint = f"did you mean {elsewhere[0]}?"
            elif near:
                hint = f"did you mean {'.'.join([*map(str, item['loc'][:-1]), near[0]])}?"
            else:
                hint = f"allowed here: {', '.join(allowed)}"
            lines.append(f"{source}: {where}: unknown key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{source}: {where}: missing; set it in the file or as {where}=…")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = "" if isinstance(given, (Mapping, BaseModel)) else f" (given: {given!r})"
            lines.append(f"{source}: {where}: {message}{shown}")
    return UserError("\n".join(lines))


def build(section: type[S], data: Mapping[str, Any], source: str) -> S:
    """Validate ``data`` as ``section``; raises UserError with every problem, one line each."""
    try:
        return section.model_validate(dict(data))
    except ValidationError as error:
        raise _explain(error, section, source) from None


def load(
    files: str | Path | Sequence[str | Path],
    overrides: Iterable[str] | Mapping[str, Any] = (),
    kind: str | None = None,
) -> Any:
    """Read one config.

    files: one YAML file or several, merged left to right. overrides: ``key=value`` words, or a nested mapping,
    laid on top. kind: the kind the caller can use; another one is an error.
    Returns a frozen section (see KINDS). Raises UserError.
    """
    paths = [Path(files)] if isinstance(files, (str, Path)) else [Path(f) for f in files]
    data: dict[str, Any] = {}
    for path in paths:
        data = merge(data, read(path))
    data = merge(data, overrides if isinstance(overrides, Mapping) else parse(overrides))
    return resolve(data, str(paths[-1]), kind)


def resolve(data: Mapping[str, Any], source: str, kind: str | None = None) -> Any:
    """A whole file's content as the section its kind names; see ``load``."""
    found = data.get("kind")
    if found not in KINDS:
        near = difflib.get_close_matches(str(found), KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(KINDS)}"
        what = "missing" if found is None else f"{found!r} is unknown"
        raise UserError(f"{source}: kind: {what}; {hint}")
    if kind is not None and found != kind:
        raise UserError(f"{source}: kind is {found!r}, but this program reads kind: {kind}")
    return build(KINDS[found], data, source)


def shrink(config: S, factor: float) -> S:
    """The same config with every scaled number of images (section.Images, Pictures) times ``factor``, and at least one.

    A training's lengths stay whole batches, in its ladder too, by the rung's own batch. Raises UserError where the
    short lengths do not go together.
    """
    data = config.model_dump()
    keys = dict(scaled_keys(type(config)))
    train = data.get("train")
    batch = train["global_batch"] if isinstance(train, dict) else 1  # other programs have a section called otherwise

    def scaled(value: Any, key: str, batch: int) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(sorted({scaled(inner, key, batch) for inner in value}))
        unit = batch if keys[key].whole_batches else 1
        return max(1, round(value * factor / unit)) * unit if value else value

    for key in keys:
        section, last = _inner(data, key)
        if last in section:
            section[last] = scaled(section[last], key, batch)
    for changes in data.get("ladder", {}).values():
        own = changes.get("train.global_batch", batch)
        if own != batch:
            changes.setdefault("train.images", config.model_dump()["train"]["images"])
        changes.update({key: scaled(value, key, own) for key, value in changes.items() if key in keys})
    return build(type(config), data, f"shrunk by {factor}")


def _inner(data: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The section that holds a dotted key (empty where there is none), and the key's own name."""
    *path, last = dotted.split(".")
    section: Any = data
    for part in path:
        section = section.get(part) or {}
    return section, last


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and math.isfinite(value):
        # PyYAML writes 1e-05, which YAML 1.1 readers take for a string: keep a point in the mantissa.
        text = repr(value)
        return _Float(value) if "e" in text else value
    return str(value) if isinstance(value, Path) else value


class _Float(float):
    pass


class _Dumper(yaml.SafeDumper):
    pass


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    mantissa, exponent = repr(float(value)).split("e")
    point = mantissa if "." in mantissa else mantissa + ".0"
    sign = "-" if exponent.startswith("-") else "+"
    return dumper.represent_scalar("tag:yaml.org,2002:float", f"{point}e{sign}{exponent.lstrip('+-')}")


_Dumper.add_representer(_Float, _represent_float)


def dump(section: Section) -> str:
    """The resolved config as YAML text; ``load`` of it gives an equal section back."""
    return yaml.dump(_plain(section.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def difference(old: Section, new: Section, ignore: Iterable[str] = ()) -> list[str]:
    """Dotted keys that differ, as ``key: old -> new`` lines; keys under a prefix in ``ignore`` are left out."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}
        return {prefix[:-1]: value}

    left, right = flat(_plain(old.model_dump())), flat(_plain(new.model_dump()))
    skipped = tuple(ignore)
    lines = []
    for key in sorted(left.keys() | right.keys()):
        if any(key == s or key.startswith(s + ".") for s in skipped):
            continue
        if left.get(key, "(absent)") != right.get(key, "(absent)"):
            lines.append(f"{key}: {left.get(key, '(absent)')} -> {right.get(key, '(absent)')}")
    return lines
