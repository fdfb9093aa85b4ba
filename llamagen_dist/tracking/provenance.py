"""Where a run comes from: commit and diff, versions, host and command line; secrets masked."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import llamagen_dist

SOURCE_FOLDERS = ("llamagen_dist", "tokenizer_training", "eval", "examples", "configs", "slurm")
"""What jobs may need of the checkout."""
ABSENT = "absent"
"""The version of a package that is not installed."""
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "submitit", "webdataset", "pydantic")
ENVIRONMENT = re.compile(r"^(LLAMAGEN|OMP|MKL|CUDA|NCCL|GLOO|TORCH|WANDB|SLURM|HF)_")
SECRET = re.compile(r"(?i:(?<!caption-)(?<!class-)(?<!wc)key|secret|passw|credential|token(?!ize|s\b|s_))|TOKENS\b")
"""A name whose value nobody should see. A tokenizer is none, nor are counts (tokens=256), nor names of JSON keys."""
# A value as a shell reads it: quoted pieces, which may hold line breaks, and bare ones, without a space between.
_VALUE = r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'";&|])+"""
_QUOTED = re.compile(r"""(?P<quote>["'])(?P<name>[A-Za-z_]\w*)=(?:\\.|(?!(?P=quote)).)*(?P=quote)""", re.DOTALL)
_ASSIGNED = re.compile(rf"(?P<quote>)\b(?P<name>[A-Za-z_]\w*)=(?P<value>{_VALUE})", re.DOTALL)
_OPTION = re.compile(rf"(?<!\S)(?P<name>--?[A-Za-z][\w-]*)(?P<gap>[ \t=]+)(?P<value>{_VALUE})", re.DOTALL)
_LOGIN = re.compile(rf"(?P<login>\blogin[ \t]+)(?!-)(?P<value>{_VALUE})", re.DOTALL)

_ADDRESS = re.compile(r"(?P<scheme>\w+://)(?:[^/@\s]*@)?(?P<rest>[^?#\s]*)(?:[?#]\S*)?")


def versions(*packages: str) -> dict[str, str]:
    """Of Python, this package and the installed ``packages``, by name; ``absent`` for one that is not installed."""
    known = {"python": platform.python_version(), "llamagen-dist": llamagen_dist.__version__}
    for package in packages:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            known[package] = ABSENT
    return known


def record(root: Path) -> dict[str, Any]:
    """Where the code comes from and what it runs on; secrets masked."""
    commit = git(root, "rev-parse", "HEAD")
    return {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from": str(root),
        "commit": commit.strip() if commit else None,
        "diff": git(root, "diff", "HEAD", "--", *SOURCE_FOLDERS) if commit else None,
        "versions": versions(*PACKAGES),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "command": masked_command(sys.argv),
        "environment": {
            k: "***" if SECRET.search(k) else v for k, v in sorted(os.environ.items()) if ENVIRONMENT.match(k)
        },
    }


def masked_command(argv: list[str]) -> str:
    """The command line; values of secret-looking ``key=value`` words and ``--key value`` options masked."""
    words: list[str] = []
    hide_next = False
    for word in argv:
        key, equals, _ = word.partition("=")
        if hide_next:
            words.append("***")
        elif equals and SECRET.search(key):
            words.append(f"{key}=***")
        else:
            words.append(word)
        hide_next = not equals and word.startswith("-") and bool(SECRET.search(word))
    return shlex.join(words)


def masked_script(text: str) -> str:
    """A shell script for people's eyes: values of variables and options that look like secrets are hidden, whatever
    line of the script sets them and however many lines they have; so is what ``wandb login`` is given."""

    def assigned(match: re.Match[str]) -> str:
        if not SECRET.search(match["name"]):
            return match[0]
        # export "KEY=it is long": the quote began before the name, and ends the value
        return f"{match['quote']}{match['name']}=***{match['quote']}"

    def option(match: re.Match[str]) -> str:
        return f"{match['name']}{match['gap']}***" if SECRET.search(match["name"]) else match[0]

    text = _QUOTED.sub(assigned, text)
    text = _ASSIGNED.sub(assigned, text)
    return _LOGIN.sub(r"\g<login>***", _OPTION.sub(option, text))


def masked_values(value: Any, key: str = "") -> Any:
    """A config's plain values for other people's eyes: what a secret-looking key has, logins and queries in addresses
    (signed ones are keys), and shell commands are hidden."""
    if isinstance(value, Mapping):
        return {name: masked_values(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked_values(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    if SECRET.search(key):
        return "***"
    if value.startswith("pipe:"):
        return "pipe:***"
    return masked_script(_ADDRESS.sub(r"\g<scheme>\g<rest>", value))


def git(root: Path, *arguments: str) -> str | None:
    """git's answer, or None where there is no git, no repository, or git refuses."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    return done.stdout if done.returncode == 0 else None
