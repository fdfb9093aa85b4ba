"""YAML as people read it: files with their ``base``, ``key=value`` words, and back to text."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llamagen_dist.errors import UserError


class _Loader(yaml.SafeLoader):
    """1e-4 is a number, 012 is twelve, on/off/yes/no and 2026-11-26 are words, a key appears once. (YAML 1.1 says
    otherwise.)"""


class _Dumper(yaml.SafeDumper):
    """Quotes every word that our reading or YAML 1.1's takes for something else."""


_OURS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in (*_OURS, "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _OURS.items():
    for _either in (_Loader, _Dumper):
        _either.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node).replace("_", "")
    if len(digits) > 1000:  # Python refuses to read such a number, with a traceback
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(digits)} digits", node.start_mark)
    return int(digits)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is a word, no list", key_node.start_mark)
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(path: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file merged over its ``base``, unchecked: for whoever makes many configs of it. Raises UserError."""
    path = path.resolve()
    if path in chain:
        raise UserError(f"{chain[-1]}: base: {path} inherits from itself")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config file is a mapping of keys to values, not {type(data).__name__}")
    base = data.pop("base", None)
    return data if base is None else merge(read(path.parent / str(base), (*chain, path)), data)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, mapping by mapping; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = merge(merged[key], value)
        merged[key] = value
    return merged


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``, merging keys that share a prefix."""
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def parse(overrides: Iterable[str]) -> dict[str, Any]:
    """``["optim.lr=1e-4"]`` -> ``{"optim": {"lr": 1e-4}}``; values are read as YAML.

    Raises UserError for a word without ``=``.
    """
    nested: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", key):
            raise UserError(f"{word!r} is not a setting: write key=value, for example optim.lr=1e-4")
        nested = merge(nested, nest({key: _value(text)}))
    return nested


def _value(text: str) -> Any:
    """What a word of the command line says, whole: YAML takes what follows `` #`` for a comment, but the shell has
    passed it on as part of the value, a folder's name for example."""
    try:
        value = yaml.load(text, Loader=_Loader)
        # the same with a letter in place of every #: what has come out shorter has lost a comment
        kept = yaml.load(text.replace("#", "\ue000"), Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        return text
    words = text.strip()
    anchored = words.startswith(("&", "!"))  # an anchor or a tag, which would vanish too
    return words if anchored or repr(kept).replace(r"\ue000", "#") != repr(value) else value


def text_of(data: Mapping[str, Any]) -> str:
    """Mappings, lists, words and numbers as YAML that ``read`` takes for the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
