"""Where measured runs come from: folders of runs, sweeps, metrics.jsonl, tables, projects of Weights & Biases."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamagen_dist.config import GPTConfigFile
from llamagen_dist.config.loader import resolve
from llamagen_dist.data.manifest import MANIFEST
from llamagen_dist.data.shards import manifest_of
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file
from llamagen_dist.scaling.ladder import Count, Ladder, Run, held_out_images, of_runs, runs_in
from llamagen_dist.scaling.points import AS_NAMED, Dropped, Options, Points, Table, read_table, table, together

WANDB = "wandb:"


@dataclass(frozen=True, eq=False)
class Inputs:
    """points; ladder: where they came from runs of ours. sources: what was read, with its sha256 where it is a file."""

    points: Points
    ladder: Ladder | None
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]
    sources: tuple[Mapping[str, Any], ...]

    def dropped_rows(self) -> list[dict[str, str]]:
        """For a result's ``dropped``."""
        return [vars(one) for one in self.dropped]

    def record(self) -> dict[str, Any]:
        """For a result's ``record``: what was read, and of our own runs how N counts and their largest model."""
        own = self.ladder
        known = {} if own is None else {"count": own.count, "model": asdict(own.rungs[-1].config)}
        return {"inputs": list(self.sources), "notes": list(self.notes), **known}


def read(places: Sequence[str], count: Count = "blocks", options: Options = AS_NAMED) -> Inputs:
    """All points of all places: runs (folders, their metrics.jsonl, W&B) or tables (CSV, JSON lines, W&B).

    Raises UserError: nothing there, runs and tables together (a table does not say how it counts), and whatever
    ``runs_in``, ``of_runs`` and ``table`` refuse.
    """
    folders: list[Path] = []
    runs: list[Run] = []
    tables: list[Table] = []
    dropped: list[Dropped] = []
    sources: list[Mapping[str, Any]] = []
    for place in places:
        path = Path(place)
        if place.startswith(WANDB):
            own, objects, passed = read_wandb(place.removeprefix(WANDB), options.metric)
            runs += own
            dropped += passed
            sources.append({"path": place})
            if objects:
                tables.append(table(objects, place, options))
        elif path.is_dir() or (path.name == "metrics.jsonl" and (path.parent / "config.yaml").is_file()):
            folders.append(path if path.is_dir() else path.parent)
        else:
            tables.append(read_table(path, options))
            sources.append({"path": place, "sha256": sha256_file(path)})
    if folders:
        found, passed = runs_in(folders)
        runs += found
        dropped += passed
        sources += [{"path": run.source, "sha256": sha256_file(Path(run.source) / "metrics.jsonl")} for run in found]
    if runs and tables:
        raise UserError(f"{', '.join(places)}: runs and tables together; a table does not say how its N counts")
    if tables:
        dropped += [one for _, passed, _ in tables for one in passed]
        notes = tuple(text for _, _, said in tables for text in said)
        return Inputs(together([points for points, _, _ in tables]), None, tuple(dropped), notes, tuple(sources))
    ladder = of_runs(runs, count, options, dropped)
    return Inputs(ladder.points, ladder, ladder.dropped, (), tuple(sources))


def read_wandb(
    project: str, metric: str | None = None
) -> tuple[list[Run], list[tuple[str, Mapping[str, Any]]], list[Dropped]]:
    """The finished runs of ENTITY/PROJECT: GPT runs of ours, others as (address, config and summary), and what was
    passed over. metric: what to ask for beside the held-out loss.
    Raises UserError: no such project, nothing in it, no answer, no key."""
    import wandb

    if project.count("/") != 1 or not all(project.split("/")):
        raise UserError(f"{WANDB}{project}: write {WANDB}ENTITY/PROJECT")
    try:
        found = list(wandb.Api(timeout=30).runs(project, lazy=False))
        if not found:
            raise UserError(f"{WANDB}{project}: no run in it")
        runs: list[Run] = []
        objects: list[tuple[str, Mapping[str, Any]]] = []
        dropped: list[Dropped] = []
        for run in found:
            address = f"{WANDB}{project}/{run.id}"
            config = dict(run.config)
            if run.state != "finished":
                dropped.append(Dropped(address, f"not finished ({run.state})"))
            elif config.get("kind") == "gpt":
                # one question each: a row is given only where it has all keys that were asked for
                wanted = dict.fromkeys(["val_loss", metric or "val_loss"])
                rows = [row for key in wanted for row in run.scan_history(keys=["images_seen", key])]
                runs.append(wandb_run(address, run.name, config, dict(run.summary), rows))
            elif "kind" in config:
                dropped.append(Dropped(address, f"a run of kind {config['kind']}"))
            else:
                objects.append((address, {"run": run.name or run.id, **config, **dict(run.summary)}))
    except (wandb.Error, ValueError, OSError) as error:  # requests' errors are OSErrors
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{WANDB}{project}: cannot be read from Weights & Biases ({text})") from None
    if not runs and not objects:
        raise UserError(f"{WANDB}{project}: no finished run in it ({len(dropped)} left out: {dropped[0].why})")
    return runs, objects, dropped


def wandb_run(
    address: str, name: str, data: Mapping[str, Any], summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Run:
    """One GPT run as its tracker recorded it. rows: history with images_seen and val_loss or another metric.

    Raises UserError where its config is of another version, or its token shards are not here to say the vocabulary.
    """
    known = {key: value for key, value in data.items() if key in GPTConfigFile.model_fields}
    config = resolve(known, address)
    assert isinstance(config, GPTConfigFile)
    if not (Path(config.data.train) / MANIFEST).is_file():
        raise UserError(
            f"{address}: its token shards ({config.data.train}) are not here, and they say how many codes and tokens "
            "its model has; run this where they are"
        )
    sizes = manifest_of(config.data.train, config.data).gpt_sizes(config.data.train)
    points = [(f"{address}, after {row.get('images_seen')} images", row) for row in rows]
    params = summary.get("params")
    return Run(name, address, config, params, sizes, held_out_images(config), points)
