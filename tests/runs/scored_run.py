"""A training of seconds whose checkpoints are scored, for the tests of that here and on a cluster."""

from pathlib import Path

import yaml

from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.tracking import evaluations
from tests.runs.sampling_work import SIZES, make_work

BATCH, STEPS = 8, 40
STAGES = ("sample", "evaluate", "record")


def scored_work(folder: Path) -> Path:
    """A tokenizer, its tokens, real images, and the configs of a training whose checkpoints are scored."""
    folder = make_work(folder)
    scored = {
        "kind": "evaluate",
        "generated": "x",
        "reference": str(folder / "images"),
        "out": "x",
        "metrics": ["fid"],
        "limit": 4,
        "batch": 4,
        "threads": 1,
        "inception": {"cache": str(folder / "cache")},
    }
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(scored))
    training = {
        "kind": "gpt",
        "run_dir": str(folder / "unused"),
        "model": SIZES,
        "data": {"train": str(folder / "tokens"), "validation": str(folder / "tokens")},
        "train": {"images": STEPS * BATCH, "global_batch": BATCH},
        "checkpoint": {"every_images": 10 * BATCH, "keep_last": 1},
        "log": {"every_steps": 1},
        "parallel": {"threads": 1},
    }
    (folder / "gpt.yaml").write_text(yaml.safe_dump(training))
    section = {
        "every_images": 20 * BATCH,
        "sample": str(folder / "sample.yaml"),
        "evaluate": str(folder / "evaluate.yaml"),
        "images": 4,
    }
    (folder / "scored.yaml").write_text(yaml.safe_dump({"base": "gpt.yaml", "evaluation": section}))
    return folder


def ended(run: Path, step: int) -> dict[str, int]:
    """How often each program of an evaluation came to its end."""
    folder = evaluations.folder_of(run, step)
    events = {name: JobFolder.of(folder / "stages" / name).events() for name in STAGES}
    return {
        name: sum(event["event"] == "ended" and event.get("outcome") == "done" for event in events[name])
        for name in STAGES
    }
