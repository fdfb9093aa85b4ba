"""Scoring the checkpoints of a run: for each a pipeline of three programs in RUN/evaluations/step-XXXXXXXX.

What makes pipelines safe makes this safe, here and on a cluster: there is one launcher at a time, a finished stage is
never run again, and an unfinished one is continued.
"""

import json
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from llamagen_dist.config import EvaluationSection, PipelineConfig, StageSection, dump
from llamagen_dist.console import Screen
from llamagen_dist.errors import EXIT_INTERRUPTED, UserError
from llamagen_dist.files import locked_where_possible, only_launcher, own_folder, read_json, write_text
from llamagen_dist.launch import here
from llamagen_dist.launch.graph import Graph
from llamagen_dist.launch.slurm import launch
from llamagen_dist.launch.slurm.launch import Target
from llamagen_dist.launch.stages import fill
from llamagen_dist.tracking import evaluations as scores


def graph_of(run: Path, section: EvaluationSection, checkpoint: Path, nodes: int | None = None) -> Graph:
    """The evaluation of one checkpoint. nodes: on a cluster. Raises UserError for what the files say wrongly."""
    folder = scores.folder_of(run, scores.step_of(checkpoint))
    pictures, result = folder / "samples" / "model.npz", folder / scores.RESULT
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    drawn = scores.sampling(section, checkpoint=checkpoint, out=pictures.parent)
    scored = scores.scoring(section, generated=pictures, out=result)
    stages = []
    for name, why, module, config, produces in (
        ("sample", "draw pictures with the checkpoint", "eval.sample", drawn, pictures),
        ("evaluate", "score them", "eval.evaluate", scored, result),
    ):
        write_text(folder / f"{name}.yaml", dump(config))
        stages.append(
            StageSection(
                name=name,
                why=why,
                module=module,
                config=folder / f"{name}.yaml",
                ranks=section.ranks,
                nodes=nodes,
                produces=(str(produces),),
            )
        )
    words = ("evaluate", str(run), "--record", *(["--keep-pictures"] if section.keep_pictures else []))
    why = "a line of evaluations.jsonl, and of the trackers"
    stages.append(StageSection(name="record", why=why, module="llamagen_dist.cli", arguments=words))
    title = f"{run.name}, step {scores.step_of(checkpoint)}"
    return fill(PipelineConfig(kind="pipeline", title=title, stages=tuple(stages)), folder / "pipeline.yaml", folder)


def score(
    run: Path,
    section: EvaluationSection,
    last: int,
    target: Target | None = None,
    *,
    retry_failed: bool = False,
    follow: bool = False,
    wait: bool = False,
) -> int:
    """Evaluate every checkpoint of ``run`` that is due and has no scores; on a cluster submit that.

    last: images of the whole run. target: None is this machine.
    follow: on a cluster, stay until each has ended.
    wait: for another launcher that is at it, instead of refusing.
    Returns how many have failed, each of which is said in a line. Raises UserError; SystemExit(130) after a stop.
    """
    run, screen, failures = run.absolute(), Screen(), 0
    own_folder(run / "evaluations")
    with ExitStack() as stack:
        lock = run / "evaluations" / "lock"
        if wait:
            stack.enter_context(_after_others(lock, screen))
        else:
            stack.enter_context(only_launcher(lock))
        for checkpoint in scores.due(run, section.every_images, last):
            step, folder = scores.step_of(checkpoint), scores.folder_of(run, scores.step_of(checkpoint))
            if (known := scores.failed(folder)) is not None and not retry_failed:
                screen.say(
                    f"step {step}: its evaluation failed earlier: {_named(known)}; --retry-failed tries it again"
                )
                failures += 1
                continue
            screen.say(f"step {step}: {checkpoint}")
            try:
                _begin(run, section, checkpoint, target, follow)
            except UserError as error:
                known = scores.failed(folder)
                screen.say(f"step {step}: not evaluated: {error if known is None else _named(known)}")
                failures += 1
            except SystemExit as end:
                if end.code == EXIT_INTERRUPTED:
                    raise
                screen.say(f"step {step}: not evaluated: {_named(scores.failed(folder))}")
                failures += 1
    return failures


def _after_others(lock: Path, screen: Screen) -> AbstractContextManager[None]:
    """Hold the lock, once no other evaluation of the run does; on a disk without locks at once."""
    said = False

    def wait() -> None:
        nonlocal said
        if not said:
            screen.say(f"waiting for another llamagen evaluate, which has {lock}")
        said = True
        time.sleep(0.5)

    return locked_where_possible(lock, wait)


def _begin(run: Path, section: EvaluationSection, checkpoint: Path, target: Target | None, follow: bool) -> None:
    graph = graph_of(run, section, checkpoint, None if target is None else target.profile.nodes)
    state = read_json(checkpoint / "state.json")
    drawn = scores.sampling(section)
    about = {
        "step": state["step"],
        "images_seen": state["images_seen"],
        "weights": drawn.weights or "trained",
        "checkpoint": str(checkpoint),
    }
    if not (graph.out / "config.yaml").exists():
        graph.keep()
    if not (graph.out / "checkpoint.json").exists():
        write_text(graph.out / "checkpoint.json", json.dumps(about, indent=1))
    if not (graph.out / "code").exists():  # one snapshot for all evaluations of a run
        (run / "code").mkdir(exist_ok=True)
        (graph.out / "code").symlink_to("../../code")
    if target is None:
        here.run(graph)
    else:
        launch.run(graph, target, follow=follow)


def _named(failure: tuple[str, Path] | None) -> str:
    return "it was interrupted" if failure is None else f"{failure[0]} (log: {failure[1]})"
