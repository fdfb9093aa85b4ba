"""``--dry-run``: the stages with what they work on and where they write. Only what is known beforehand is shown."""

from pathlib import Path

from rich.table import Table

from llamagen_dist.config import (
    EvaluateConfig,
    ExtractConfig,
    GPTConfigFile,
    ReconstructConfig,
    SampleConfig,
    SearchConfig,
    TokenizerConfigFile,
    rungs,
)
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.files import json_if_there
from llamagen_dist.launch.graph import Graph, Node


def show(graph: Graph) -> None:
    """Print a row per stage: ranks, program, size, the folders it fills, and whether it is finished."""
    table = Table(title=f"{graph.title} -> {graph.out}")
    for heading in ("", "stage", "ranks", "program", "size", "writes", ""):
        table.add_column(heading, overflow="fold")
    for number, stage in enumerate(graph.nodes, start=1):
        folders = ", ".join(writes(stage, graph.out))
        finished = "finished" if stage.is_finished() else ""
        table.add_row(str(number), stage.name, str(stage.ranks), stage.module, size(stage), folders, finished)
    screen = Screen()
    screen.console.print(table, soft_wrap=False)
    screen.say("Nothing was started.")


def writes(stage: Node, out: Path) -> list[str]:
    """The files and folders that the stage fills, relative to ``out`` where they lie in it."""
    config = stage.config
    target = getattr(config, "out", None) or getattr(config, "run_dir", None) or (stage.sweep and stage.sweep.out)
    paths = (
        [target]
        if target
        else sorted({path.parent if path.name == "manifest.json" else path for path in stage.produces})
    )
    return [str(path.relative_to(out)) if path.is_relative_to(out) and path != out else str(path) for path in paths]


def size(stage: Node) -> str:
    """How many images, models or points the stage goes through; empty where that shows only when it runs."""
    config, images = stage.config, stage.images
    if stage.sweep is not None:
        return f"{len(stage.sweep.nodes)} points"
    if isinstance(config, GPTConfigFile):
        runs = rungs(config)
        many = f"{len(runs)} GPTs ({runs[0][0]} to {runs[-1][0]}), " if len(runs) > 1 else ""
        return f"{many}{sum(rung.train.images for _, rung in runs):,} images"
    if isinstance(config, TokenizerConfigFile):
        return f"{config.train.images:,} images"
    if isinstance(config, SampleConfig):
        return f"{config.images * len(config.sets):,} pictures"
    if isinstance(config, EvaluateConfig):
        sets = {path for pair in config.pairs().values() for path in (pair.images, pair.reference)}
        return f"{len(sets)} sets of {'all' if config.limit is None else f'{config.limit:,}'} images"
    if isinstance(config, SearchConfig):
        from llamagen_dist.evaluation.search import grid  # loads scipy

        more = f" and up to {config.finer} finer" if config.finer else ""
        return f"{len(grid(config))} points{more}, {config.images * len(config.noises):,} pictures each"
    if stage.arguments[:1] == ("pack",):
        images = _pictures(stage.arguments[1])
    crops = ""
    if isinstance(config, ExtractConfig):
        number = {"center": 1, "center_flip": 2, "ten_crop": 10 * len(config.crop_ranges)}[config.crops]
        crops = f"{number} crop{'s' * (number > 1)}"
        images = images if images is not None else _packed(config.images)
    elif isinstance(config, ReconstructConfig):
        images = images if images is not None else _packed(config.images)
        if config.limit is not None:
            images = config.limit if images is None else min(images, config.limit)
    if images is None:
        return f"{crops} per image" if crops else ""
    return f"{images:,} images{' x ' if crops else ''}{crops}"


def _packed(shards: str | Path) -> int | None:
    """The number of images in these shards; None where they are remote or not there yet: nothing is fetched here."""
    manifest = json_if_there(Path(shards) / "manifest.json")
    return None if manifest is None else int(manifest["count"])


def _pictures(source: str) -> int | None:
    """How many pictures packing will read there, and not how many files lie there; None where it would refuse."""
    from llamagen_dist.data.formats import count  # loads PIL, which no other row needs

    try:
        return count(source)
    except UserError:
        return None
