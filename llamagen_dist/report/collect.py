"""What a folder holds, of whatever kind and however far it is. What is not there is absent, never guessed."""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamagen_dist.build import gpt_config
from llamagen_dist.config import load
from llamagen_dist.config.yaml_text import read as read_yaml
from llamagen_dist.data.shards import manifest_of
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_sets import ImageSet, open_images
from llamagen_dist.files import json_if_there, read_json, read_jsonl
from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.tracking import evaluations

MODELS = ("gpt", "tokenizer")
"""Kinds of configs whose programs train."""
_NOT_RUNS = frozenset(["code", "stages", "launch", "log", "lock", "report", "checkpoints"])
# Results of llamagen scaling -> the keys they are known by, each with the names it has had.
_STUDIES = {
    "scaling": (("form",), ("params", "parameters")),
    "isoflop": (("budgets",), ("exponents",)),
    "advice": (("configs",), ("optimum",)),
    "recipes": (("tasks",), ("baseline",)),
}


@dataclass(frozen=True)
class Stage:
    """Of a pipeline. seconds and peak_rss_gb are None while it has not finished."""

    name: str
    why: str
    ranks: int
    seconds: float | None = None
    peak_rss_gb: float | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """A run directory, or a point of a sweep whose program is no training.

    training, validation: the lines of metrics.jsonl, oldest first.
    summary: summary.json, empty while the run has not finished. record: record.json.
    settings: config.yaml as it is written; config: as a section, None where this version cannot read it (note says
        why) or there is none.
    evaluation: evaluation.json, of a point that is one.
    scored: the lines of its checkpoints' evaluations, by step.
    codebook: the arrays of a tokenizer's codebook.npz (tokenizer_training/codebook.py says which); empty without one.
    finished: as summary.json, the launcher's DONE.json or the evaluation say.
    failed: why nobody resumes it by itself; empty where that is not so.
    """

    name: str
    folder: Path
    training: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Any = None
    note: str = ""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    scored: Sequence[Mapping[str, Any]] = ()
    codebook: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    finished: bool = False
    failed: str = ""

    @property
    def kind(self) -> str:
        return str(self.settings.get("kind", "gpt"))

    def points(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(images seen, value) of the lines that have the key, where it is finite and training had begun."""
        lines = self.training if any(key in line for line in self.training) else self.validation
        rows = [
            (p["images_seen"], p[key]) for p in lines if p["images_seen"] > 0 and math.isfinite(p.get(key, math.nan))
        ]
        x, y = np.array(rows, np.float64).reshape(-1, 2).T
        return x, y

    def median(self, key: str) -> float | None:
        values = self.points(key)[1]
        return float(np.median(values)) if len(values) else None

    @property
    def seen(self) -> int:
        """Images."""
        return max((int(line["images_seen"]) for line in (*self.training[-1:], *self.validation[-1:])), default=0)

    @property
    def averaged(self) -> bool:
        """Whether held-out losses are of the moving average of the weights."""
        trains = self.kind in ("gpt", "tokenizer") and self.config is not None
        return trains and self.config.validation.weights == "ema"

    @property
    def score(self) -> float | None:
        """What runs are ranked by, lower is better: the last held-out loss, or the FID of an evaluation."""
        sets = self.evaluation.get("sets") or {}
        value = sets.get("model", next(iter(sets.values()), {})).get("fid")
        if not sets and self.validation:
            value = self.validation[-1].get("val_loss")
        return value if value is not None and math.isfinite(value) else None

    @property
    def params(self) -> int | None:
        return self.summary.get("params")

    @property
    def tokens_per_image(self) -> int | None:
        return self.summary.get("tokens_per_image")

    @property
    def layout(self) -> str:
        """In words; empty where it is not known."""
        known = self.summary.get("layout")
        if not known:
            return ""
        ranks = "1 rank" if known["ranks"] == 1 else f"{known['ranks']} ranks"
        return f"{ranks} (tensor {known['tensor']} × data {known['data']}, ZeRO-{known['zero']})"

    @property
    def state(self) -> str:
        """``finished``, ``failed``, or how far it is."""
        if self.finished:
            return "finished"
        if self.failed:
            return "failed"
        total = self.settings.get("train", {}).get("images")
        share = f" ({self.seen / total:.0%})" if isinstance(total, int) and total else ""
        return f"unfinished: {self.seen:,} images seen{share}" if self.seen else "unfinished: nothing logged yet"

    @property
    def epoch(self) -> int | None:
        """Images of the training set; None where its token shards are not there to tell."""
        if self.kind != "gpt" or self.config is None:
            return None
        try:
            return manifest_of(self.config.data.train, self.config.data).count
        except (UserError, OSError, ValueError):
            return None

    @property
    def flops_per_image(self) -> int | str:
        """Of training, exact; or why it is not known."""
        if self.kind != "gpt" or self.config is None:
            return "only a GPT whose config this version reads has a known cost"
        data = self.config.data
        try:
            manifest = manifest_of(data.train, data)
            model = gpt_config(self.config.model, **manifest.gpt_sizes(data.train))
        except (UserError, OSError, ValueError) as error:
            return f"the token shards {data.train} are not there to tell the vocabulary ({error})"
        if self.params not in (None, total_parameters(model)):
            return f"the token shards {data.train} were made again since this run"
        return training_flops_per_image(model)


@dataclass(frozen=True, eq=False)
class Pictures:
    """A file of pictures with the record beside it. names: of labels, where something says them."""

    images: ImageSet
    record: Mapping[str, Any]
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Found:
    """kind: ``pipeline``, ``sweep``, ``run``, ``evaluation``, ``search``, ``tokenizers``, ``pictures`` or ``scaling``.

    groups: the runs by the folder that they stand in (empty: the folder itself), those of a group from small to large.
    missing: points of a sweep that were never started, where something says what was planned.
    evaluations: results of eval.evaluate by file name.
    search: what eval.search found. tokenizers: what eval.tokenizers did.
    scaling, left_out: what llamagen scaling fit wrote, left_out of a fit that another one to all runs followed;
        isoflop, advice, recipes: what llamagen scaling isoflop, advise and recipes wrote. Empty where there is none.
    """

    folder: Path
    kind: str
    title: str = ""
    stages: tuple[Stage, ...] = ()
    groups: Mapping[str, tuple[Run, ...]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    samples: Pictures | None = None
    reconstructions: Pictures | None = None
    held_out: Path | None = None
    """Image shards that the reconstructions are of."""
    vocab_size: int | None = None
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, Any] = field(default_factory=dict)
    isoflop: Mapping[str, Any] = field(default_factory=dict)
    advice: Mapping[str, Any] = field(default_factory=dict)
    recipes: Mapping[str, Any] = field(default_factory=dict)
    scores_images: bool = True
    """Whether a pipeline has a stage for that, as the quickstart does; true where its stages are not known."""

    @property
    def forecast(self) -> Mapping[str, Any]:
        """The fit that was asked for a run it had not seen; empty where none was."""
        return next((fit for fit in (self.scaling, self.left_out) if fit.get("prediction")), {})

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups.values() for run in group]

    @property
    def tokenizer(self) -> Run | None:
        return next((run for run in self.runs if run.kind == "tokenizer"), None)

    @property
    def ladder(self) -> tuple[Run, ...]:
        """The largest group of GPTs."""
        groups = [tuple(run for run in group if run.kind == "gpt") for group in self.groups.values()]
        return max(groups, key=len, default=())

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """What results.json is about: evaluation.json, or the only one there is."""
        only = next(iter(self.evaluations.values())) if len(self.evaluations) == 1 else {}
        return self.evaluations.get("evaluation.json", only)


def collect(path: Path, planned: Sequence[str] = ()) -> Found:
    """Read a folder, or one JSON file of an evaluation or a law.

    planned: the names of a sweep's points. Raises UserError: nothing to report on, or a damaged file.
    """
    if path.is_file():
        content = read_json(path)
        if "sets" in content:
            return Found(path, "evaluation", evaluations={path.name: content})
        if {"curves", "best", "metric"} <= content.keys():
            return Found(path, "search", search=content)
        if content.get("kind") == "tokenizers":
            return Found(path, "tokenizers", tokenizers=content)
        for name, keys in _STUDIES.items():
            if all(any(key in content for key in names) for names in keys):
                study: dict[str, Any] = {name: content}
                return Found(path, "scaling", **study)
        raise UserError(
            f"{path}: neither a result of eval.evaluate (sets), eval.search (best) or eval.tokenizers nor of llamagen "
            "scaling fit (form, params), isoflop (budgets, exponents), advise (configs, optimum) or recipes "
            "(tasks, baseline)"
        )
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run, a sweep, a pipeline's --out or an evaluation")
    config = _yaml(path / "config.yaml")
    groups = {"": (read_run(path),)} if (path / "metrics.jsonl").exists() else _groups(path)
    evaluations, pictures, search = _evaluations(path), _pictures(path), _object(path / "search.json")
    compared = _object(path / "results.json")
    compared = compared if compared.get("kind") == "tokenizers" else {}
    # of a study in configs/pipeline/scaling.yaml's names
    law, left_out, isoflop, advice, recipes = (
        _object(path / f"{name}.json") for name in ("scaling", "held-out", "isoflop", "advice", "recipes")
    )
    if (path / "stages").is_dir() or config.get("kind") == "pipeline":
        kind = "pipeline"
    elif [run.folder for runs in groups.values() for run in runs] == [path]:
        kind = "run"
    elif compared:
        kind = "tokenizers"
    elif groups or config.get("kind") == "sweep":
        kind = "sweep"
    else:
        kind = "evaluation" if evaluations else "search" if search else "pictures" if any(pictures) else ""
        kind = kind or ("scaling" if any((law, left_out, isoflop, advice, recipes)) else "")
    if not kind:
        raise UserError(
            f"{path}: nothing to report on: no run (metrics.jsonl or config.yaml), no folders of runs, no pipeline "
            "(stages/), no evaluation (JSON with sets), no search.json, no samples (model.npz) and no scaling.json in "
            "it"
        )
    return Found(
        path,
        kind,
        str(config.get("title", "")),
        _stages(path, config),
        groups,
        tuple(name for name in planned if not (path / name).is_dir()),
        *pictures,
        vocab_size=(json_if_there(path / "tokens/train/manifest.json") or {}).get("vocab_size"),
        evaluations=evaluations,
        search=search,
        tokenizers=compared,
        scaling=law or left_out,  # until the fit to all runs has followed
        left_out=left_out,
        isoflop=isoflop,
        advice=advice,
        recipes=recipes,
        scores_images="evaluate" in [stage["name"] for stage in config.get("stages", ())] or "stages" not in config,
    )


def _groups(path: Path) -> dict[str, tuple[Run, ...]]:
    if not (own := _runs(path)) and _is_run(path):  # one that has logged nothing yet
        return {"": (read_run(path),)}
    groups = {"": tuple(own), **{p.name: tuple(_runs(p)) for p in _folders(path) if not _is_run(p)}}
    return {name: runs for name, runs in groups.items() if runs}


def _yaml(path: Path) -> dict[str, Any]:
    return read_yaml(path) if path.exists() else {}


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in _NOT_RUNS]


def _is_run(folder: Path) -> bool:
    if (folder / "metrics.jsonl").exists():
        return True
    if any(folder.glob("*/metrics.jsonl")):  # of the rungs of a ladder
        return False
    if any((folder / name).exists() for name in ("launch/job.json", "launch/stage.json")):  # of a point of a sweep
        return _yaml(folder / "launch/config.yaml").get("kind") not in ("sweep", "pipeline", None)
    return _yaml(folder / "config.yaml").get("kind") in MODELS


def _runs(folder: Path) -> list[Run]:
    runs = [read_run(path) for path in _folders(folder) if _is_run(path)]
    return sorted(runs, key=lambda run: (run.params or math.inf, run.name))


def read_run(folder: Path) -> Run:
    """A run directory. Raises UserError, naming a file that is damaged."""
    metrics = folder / "metrics.jsonl"
    lines = read_jsonl(metrics, strict=True) if metrics.exists() else []
    for line in lines:
        if not {"step", "images_seen"} <= line.keys():
            raise UserError(f"{metrics}: a line without step and images_seen ({line}); restore the file")
    path = next((p for p in (folder / "config.yaml", folder / "launch/config.yaml") if p.exists()), None)
    settings = read_yaml(path) if path else {}
    config, note = None, ""
    if path:
        try:
            config = load(path)
        except UserError as error:  # another version's
            note = str(error).splitlines()[0]
    ends = ("summary.json", "evaluation.json", "launch/DONE.json", "DONE.json")
    failed = _object(folder / "launch/FAILED.json") or _object(folder / "launch/END.json")  # today's, and of before
    return Run(
        name=folder.name,
        folder=folder,
        training=[line for line in lines if "loss" in line],
        validation=[line for line in lines if "val_loss" in line],
        summary=_object(folder / "summary.json"),
        record=_object(folder / "record.json"),
        settings=settings,
        config=config,
        note=note,
        evaluation=_object(folder / "evaluation.json") or _best_of(_object(folder / "out/search.json")),
        scored=evaluations.lines(folder),
        codebook=_arrays(folder / "codebook.npz"),
        finished=any((folder / name).exists() for name in ends),
        failed=str(failed.get("reason", "no reason is recorded")) if failed else "",
    )


def _best_of(search: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a search's best point, as an evaluation would have them."""
    if not search:
        return {}
    name = search["best"][search["metric"]]["name"]
    (scores,) = (point["scores"] for point in search["points"] if point["name"] == name)
    return {"n": search["n"], "sets": {"best": {metric: values["mean"] for metric, values in scores.items()}}}


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, and the next validation writes it") from None


def _stages(out: Path, config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """In the pipeline's order; stages it does not know (an older pipeline's) follow in the order of their starts."""
    planned = {s["name"]: s for s in config.get("stages", ())} if config.get("kind") == "pipeline" else {}
    # in stages/NAME itself launches before November 2026 left it
    files = [*sorted((out / "stages").glob("*/DONE.json")), *sorted((out / "stages").glob("*/launch/DONE.json"))]
    done = {path.relative_to(out / "stages").parts[0]: read_json(path) for path in files}
    extra = sorted(done.keys() - planned.keys(), key=lambda name: str(done[name].get("started", "")))
    known = {name: {**planned.get(name, {}), **done.get(name, {})} for name in [*planned, *extra]}
    return tuple(
        Stage(name, str(one.get("why", "")), int(one.get("ranks", 1)), one.get("seconds"), one.get("peak_rss_gb"))
        for name, one in known.items()
    )


def _pictures(path: Path) -> tuple[Pictures | None, Pictures | None, Path | None]:
    """(samples, reconstructions, the shards of their originals) of a folder, or of the folders that a pipeline has."""
    samples = next((f for f in (path / "samples/model.npz", path / "model.npz") if f.exists()), None)
    rebuilt = next((f for n in ("reconstructions/", "") if (f := path / f"{n}reconstruction.npz").exists()), None)
    shards = path / "images/validation"
    if rebuilt and not (shards / "manifest.json").exists():
        shards = Path(str(_object(rebuilt.with_name("record.json")).get("image_shards", "")))
    held_out = shards if (shards / "manifest.json").exists() else None
    classes = (json_if_there(path / "images/train/manifest.json") or {}).get("classes") or ()
    return _opened(samples, classes), _opened(rebuilt, classes), held_out


def _opened(file: Path | None, classes: Sequence[str]) -> Pictures | None:
    if file is None:
        return None
    captions = file.with_name("captions.json")
    names = _list(captions) if captions.exists() else classes
    return Pictures(open_images(file), _object(file.with_name("record.json")), tuple(map(str, names)))


def _list(path: Path) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); the file is damaged") from None
    return value if isinstance(value, list) else []


def _evaluations(path: Path) -> dict[str, Mapping[str, Any]]:
    """Results of eval.evaluate in the folder, and in the folders of a sweep of evaluations, by relative name."""
    files = [*sorted(path.glob("*.json")), *sorted(path.glob("*/evaluation.json"))]
    # lists and the like are other programs', and not looked into
    objects = [file for file in files if file.name == "evaluation.json" or file.read_bytes()[:1] == b"{"]
    whole = {str(file.relative_to(path)): read_json(file) for file in objects}
    return {name: content for name, content in whole.items() if isinstance(content.get("sets"), dict)}
