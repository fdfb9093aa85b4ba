"""The last sections of a report: what it ran on, and the commands that go on from it."""

import shlex
from collections.abc import Mapping
from typing import Any

from llamagen_dist.config import GPTConfigFile
from llamagen_dist.report.blocks import Markdown, Section, Table
from llamagen_dist.report.collect import Summary

_UNTOLD = ("host", "diff", "started")  # a machine's name is nobody's business, a diff too long


def environment(s: Summary) -> Section | None:
    """What the runs' record.json says; where runs differ (a resumed folder), every value is shown."""
    records = [
        run.record for run in (s.tokenizer, *s.ladder, s.parity.other if s.parity else None) if run and run.record
    ]
    if not records:
        return None
    found: dict[str, list[str]] = {}
    for record in records:
        for key, value in _flat(record):
            if value not in found.setdefault(key, []):
                found[key].append(value)
    rows = tuple((key, ", ".join(values)) for key, values in found.items())
    return Section("Environment", (Table(("recorded by the runs", ""), rows),))


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in record.items():
        if key in _UNTOLD or value is None:
            continue
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key} ")
        else:
            pairs.append((f"{prefix}{key}".replace("_", " "), str(value)[:160]))
    return pairs


def go_on(s: Summary) -> Section:
    """Commands that exist today, with this folder's own paths in them."""
    out = shlex.quote(str(s.folder.absolute()))
    text = [
        "### With your own images",
        "One folder per class. The same stages run on them, and the same report comes out.",
        _shell("llamagen quickstart --images DIR --out runs/mine"),
    ]
    if s.largest_config is not None:
        config = shlex.quote(str((s.ladder[-1].folder / "config.yaml").absolute()))
        bigger = _bigger(s.largest_config)
        text += [
            "### A larger model on the same tokens",
            "Any key of a run's config can be changed on the command line; the same command again resumes.",
            _shell(
                f"export CONFIG={config}",
                'torchrun --nproc-per-node=2 -m llamagen_dist.train_gpt "$CONFIG" \\',
                "  run_dir=runs/larger parallel.tensor=2 parallel.zero=1 \\",
                f"  {bigger}",
            ),
            "### On several nodes",
            "Inside a SLURM allocation, one launcher per node. The global batch and the order of the data do "
            "not depend on the number of ranks, so this is the same training.",
            _shell(
                f"export CONFIG={config}",
                'export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
                "srun --nodes=2 --ntasks-per-node=1 bash -c 'torchrun --nnodes=2 --nproc-per-node=4 \\",
                '  --rdzv-backend=c10d --rdzv-endpoint=$HEAD:29500 -m llamagen_dist.train_gpt "$CONFIG" \\',
                "  run_dir=runs/larger parallel.tensor=2 parallel.zero=1 \\",
                f"  {bigger}'",
            ),
        ]
    text += [
        "### Again",
        "The report is made from the folder alone and can be made again at any time.",
        _shell(f"llamagen report {out}"),
    ]
    return Section("How to go on", (Markdown("\n\n".join(text)),))


def _bigger(config: GPTConfigFile) -> str:
    """Settings for a model well above this one: a released size, or twice an own one's width and depth."""
    model = config.model
    if model.n_layer and model.n_head and model.dim:
        return f"model.n_layer={2 * model.n_layer} model.n_head={2 * model.n_head} model.dim={2 * model.dim}"
    return "model.size=GPT-L" if model.size == "GPT-B" else "model.size=GPT-XL"


def _shell(*lines: str) -> str:
    # A fence inside a path would end the block early.
    return "```sh\n" + "\n".join(line.replace("```", "") for line in lines) + "\n```"
