"""The scores of a run's checkpoints, which programs of their own measure while it trains or afterwards.

RUN/evaluations/step-XXXXXXXX/  checkpoint.json   which checkpoint it is about (kept when the checkpoint is removed)
                                result.json       what eval.evaluate wrote, with its passport; from then on it is scored
                                stages/           the programs, as a pipeline's
RUN/evaluations.jsonl           a line per result.json, by step: what reports and trackers are fed from

The folder's name is the mark by which a step is evaluated once, over all deaths and starts. metrics.jsonl has one
writer, the training; evaluations.jsonl is written whole from the results by whoever ends an evaluation.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamagen_dist.checkpoint.folder import complete
from llamagen_dist.errors import UserError
from llamagen_dist.files import json_if_there, read_json, read_jsonl, write_text

if TYPE_CHECKING:  # llamagen status looks at folders without it
    from llamagen_dist.config import EvaluateConfig, EvaluationSection, SampleConfig

SET = "generated"
"""What a result calls the pictures."""
RESULT = "result.json"


def folder_of(run: Path, step: int) -> Path:
    return run / "evaluations" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Of a checkpoint's folder or an evaluation's."""
    return int(folder.name[len("step_") :])


def begun(run: Path) -> list[Path]:
    """The folders of evaluations, by step."""
    return sorted(path.parent for path in run.glob("evaluations/step-*/checkpoint.json"))


def failed(folder: Path) -> tuple[str, Path] | None:
    """(why, folder of the log) of an evaluation one of whose programs has failed for good; None: none has."""
    if (folder / RESULT).exists():
        return None
    for path in sorted(folder.glob("stages/*/launch/FAILED.json")):
        return str((json_if_there(path) or {}).get("reason", "no reason is recorded")), path.parents[1] / "log"
    return None


def due(run: Path, every_images: int, last: int) -> list[Path]:
    """The complete checkpoints that are to be scored and have no scores, oldest first.

    every_images: see ``EvaluationSection``. last: images of the whole run, whose last checkpoint is always scored.

    Evaluations that were begun count although their checkpoint may be gone, so that no later one takes its multiple.
    """
    checkpoints = {step_of(path): path for path in complete(run)}
    taken = {step_of(path): path / "checkpoint.json" for path in begun(run)}
    files = {step: path / "state.json" for step, path in checkpoints.items()} | taken
    reached, wanted = 0, []
    for step, file in sorted(files.items()):
        images = (json_if_there(file) or {}).get("images_seen", 0)
        multiple = images // every_images if every_images else step
        if step in checkpoints and (step in taken or multiple > reached or images >= last):
            wanted.append(checkpoints[step])
        reached = max(reached, multiple)
    return [path for path in wanted if not (folder_of(run, step_of(path)) / RESULT).exists()]


def unscored(run: Path, config: Any) -> list[Path]:
    """Checkpoints that its training must not remove: those of ``due`` (without the section, of evaluations that were
    begun by hand) whose evaluation has not failed."""
    section = getattr(config, "evaluation", None)
    every = due(run, *((1 << 62, 1 << 62) if section is None else (section.every_images, config.train.images)))
    return [path for path in every if failed(folder_of(run, step_of(path))) is None]


def recorded(run: Path) -> bool:
    """Whether evaluations.jsonl says all that the results do."""
    file = run / "evaluations.jsonl"
    return (read_jsonl(file) if file.exists() else []) == lines(run)


def sampling(section: "EvaluationSection", **more: Any) -> "SampleConfig":
    """How pictures are drawn. more: further keys. Raises UserError for what the file says wrongly."""
    own = {"tokenizer": section.tokenizer, "images": section.images}
    return _laid_on(section.sample, "sample", own | {"sets": ["model"]} | more)


def scoring(section: "EvaluationSection", **more: Any) -> "EvaluateConfig":
    """How they are scored; see ``sampling``."""
    return _laid_on(section.evaluate, "evaluate", {"reference": section.reference} | more)


def _laid_on(file: Path, kind: str, keys: Mapping[str, Any]) -> Any:
    from llamagen_dist.config import load

    try:
        return load(file, {key: value for key, value in keys.items() if value is not None}, kind=kind)
    except UserError as error:
        raise UserError("\n".join(f"evaluation.{kind}: {line}" for line in str(error).splitlines())) from None


def check(config: Any) -> None:
    """Refuse, before a training starts, an evaluation that no checkpoint of it could have: raises UserError."""
    section = getattr(config, "evaluation", None)
    if section is None:
        return
    drawn, scored = sampling(section), scoring(section, generated="model.npz")
    if drawn.weights == "ema" and config.ema.decay == 0:
        raise UserError(
            f"evaluation.sample: {section.sample} asks for the moving average (weights: ema), which this run does not "
            "keep (ema.decay: 0)"
        )
    if scored.limit is not None and scored.fewer == "refuse" and drawn.images < scored.limit:
        raise UserError(
            f"evaluation.images: {drawn.images} pictures are drawn, but {section.evaluate} scores {scored.limit} "
            "(limit); draw as many, or set a smaller limit"
        )
    if section.cluster is not None:
        from llamagen_dist.config import load

        load(section.cluster, kind="cluster")


def lines(run: Path) -> list[dict[str, Any]]:
    """What evaluations.jsonl says: step, images_seen, weights, n, the scores, and the path of the whole result below
    RUN. Raises UserError for a damaged result."""
    return [_line(run, folder) for folder in begun(run) if (folder / RESULT).exists()]


def _line(run: Path, folder: Path) -> dict[str, Any]:
    about, result = read_json(folder / "checkpoint.json"), read_json(folder / RESULT)
    scores = result.get("sets", {}).get(SET)
    if not isinstance(scores, dict):
        raise UserError(f"{folder / RESULT}: holds no set {SET!r}; delete {folder} and evaluate it again")
    known = {key: about[key] for key in ("step", "images_seen", "weights")}
    return {**known, **scores, "result": str((folder / RESULT).relative_to(run))}


def write_lines(run: Path) -> None:
    """Make evaluations.jsonl anew; of several at once the last to end has read what the others wrote."""
    written = "" if not (run / "evaluations.jsonl").exists() else None
    while (text := "".join(json.dumps(line) + "\n" for line in lines(run))) != written:
        write_text(run / "evaluations.jsonl", text)
        written = text


class Lines:
    """The lines of an evaluations.jsonl that grows, each once."""

    def __init__(self, run: Path) -> None:
        self._path = run / "evaluations.jsonl"
        self._stamp: tuple[int, int] | None = None
        self._returned: set[int] = set()

    def new(self) -> Iterator[dict[str, Any]]:
        """Those that have not been returned before."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return
        if (stat.st_ino, stat.st_mtime_ns) == self._stamp:
            return
        self._stamp = stat.st_ino, stat.st_mtime_ns
        for line in read_jsonl(self._path):
            if line["step"] not in self._returned:
                self._returned.add(line["step"])
                yield line
