"""What is launched, as a graph: a launch is one node, a sweep nodes without edges, a pipeline nodes with edges.

A node is one program in one folder, or in a pipeline a whole sweep. Every node is filled in (its exact program, config
and folder) before anything is started or written. Executors: here.py and slurm/launch.py.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llamagen_dist.config import PipelineConfig, Section, SweepConfig, difference, dump, load
from llamagen_dist.config.resume import ELASTIC, between
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text
from llamagen_dist.launch import snapshot
from llamagen_dist.launch.folder import JobFolder, finish_whole, started_in
from llamagen_dist.launch.state import JobState
from llamagen_dist.tracking import evaluations

# How a node is executed may change between two commands; what it computes may not. A ladder is part of that.
_MAY_CHANGE = tuple(key for key in ELASTIC if key != "ladder")


@dataclass(frozen=True)
class Node:
    """One program, everything filled in. With a config, that file's path becomes its first argument."""

    name: str
    module: str
    folder: Path
    """Where the launcher keeps what it knows of it: FOLDER/launch (folder.py)."""
    why: str = ""
    ranks: int = 1
    """On this machine …"""
    nodes: int | None = None
    """… and on a cluster, None: as its profile says."""
    gpus_per_node: int | None = None
    arguments: tuple[str, ...] = ()
    config: Section | None = None
    produces: tuple[Path, ...] = ()
    """Files that must exist when it is done."""
    images: int | None = None
    """How many it works on, where only the pipeline file says so."""
    after: tuple[str, ...] = ()
    """Edges: nodes that must have ended well before."""
    sweep: "Graph | None" = None
    """The sweep whose points run instead of a single program; ``config`` is then the sweep's."""

    @property
    def job(self) -> JobFolder:
        return JobFolder.of(self.folder)

    def programs(self) -> tuple["Node", ...]:
        """What runs as a job of its own: the node, or the points of its sweep."""
        return (self,) if self.sweep is None else self.sweep.nodes

    def identity(self) -> dict[str, Any]:
        """What decides the result; the number of ranks does not (runs resume on any layout)."""
        return {
            "module": self.module,
            "arguments": list(self.arguments),
            "config": None if self.config is None else dump(self.config),
        }

    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def changes(self, as_run: bool = False) -> list[str]:
        """How it differs from what its folder was started with, as ``key: old -> new`` lines; none if it was not.

        as_run: leave out what a run accepts that is started again, a longer training for example.
        """
        started = self.job.read(self.job.job)
        if started is None:
            return []
        earlier, mine = started["identity"], self.identity()
        lines = [
            f"{key}: {earlier[key]} -> {mine[key]}" for key in ("module", "arguments") if earlier[key] != mine[key]
        ]
        if earlier["config"] == mine["config"]:
            return lines
        if self.config is None or earlier["config"] is None:
            return [*lines, "config: " + ("added" if earlier["config"] is None else "taken away")]
        # read again rather than compared as text: a later version writes more keys
        config = self.job.where(self.job.config)
        before = load(config) if config else self.config
        changed = difference(before, self.config, ignore=_MAY_CHANGE)
        if as_run:
            refused = between(before, self.config).refused
            changed = [line for line in changed if line in refused or line.startswith("ladder")]
        return lines + changed

    def reopens(self) -> bool:
        """Whether its config now asks for more than a finished program in its folder has done."""
        config = self.job.where(self.job.config)
        if config is None or self.config is None or config.read_text(encoding="utf-8") == dump(self.config):
            return False
        return between(load(config), self.config).reopens

    def reopened(self, state: JobState) -> JobState:
        """The state of its folder, where a finished program that ``reopens`` is open."""
        return replace(state, kind="open") if state.kind == "finished" and self.reopens() else state

    def is_finished(self) -> bool:
        """Whether it has ended well and all that it promises to produce is there. That its folder is about this very
        config has been made sure of by ``Graph.check``."""
        return self.job.is_done() and all(path.exists() for path in self.produces)

    def missing(self) -> Path | None:
        return next((path for path in self.produces if not path.exists()), None)

    def prepare(self) -> tuple[tuple[str, ...], float]:
        """Write down what it is started with, and forget an earlier end. Returns the program's arguments, and the
        seconds that earlier attempts took."""
        job = self.job
        job.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        spent = (job.read(job.job) or {}).get("spent_s", 0.0)
        job.forget(job.done, job.failed)
        if self.config is not None:
            write_text(job.config, dump(self.config))
        self.attempted(spent)
        return self.command(), spent

    def command(self) -> tuple[str, ...]:
        """The program's arguments."""
        return self.arguments if self.config is None else (str(self.job.config), *self.arguments)

    def attempted(self, spent_s: float) -> None:
        """Write job.json. spent_s: of all attempts so far, in seconds."""
        write_text(self.job.job, json.dumps({"identity": self.identity(), "spent_s": spent_s}, indent=1))

    def record(self, code: Path, ranks: int, began: float | None = None) -> dict[str, Any]:
        """What DONE.json says besides what it took. began: seconds since 1970, now by default."""
        return {
            "name": self.name,
            "why": self.why,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began)),
            "ranks": ranks,
            "module": self.module,
            "config_sha256": self.sha256(),
            "code": code.name,
        }

    def finish_sweep(self, record: Mapping[str, Any]) -> None:
        """Write the DONE.json of a node whose points are all finished. Raises UserError where something is missing."""
        assert self.sweep is not None
        if not finish_whole(self.sweep.out, self.job.done, record):
            raise UserError(f"stage {self.name}: a point has lost its DONE.json meanwhile; start again")
        if (missing := self.missing()) is not None:
            self.job.done.unlink()
            raise UserError(f"stage {self.name}: all its points are finished, but {missing} is not there")


@dataclass(frozen=True)
class Graph:
    """``out``: the folder of everything. ``config``: as read, with the command line's settings in it; it is kept as
    OUT/config.yaml."""

    kind: Literal["launch", "sweep", "pipeline"]
    title: str
    out: Path
    nodes: tuple[Node, ...]
    config: PipelineConfig | SweepConfig | None = None

    @property
    def at_once(self) -> int | None:
        """How many points of a sweep may run at the same time; None: all."""
        return self.config.at_once if isinstance(self.config, SweepConfig) else None

    @property
    def module(self) -> str:
        """Of a sweep: the program of all points."""
        assert isinstance(self.config, SweepConfig)
        return self.config.module

    @property
    def lock(self) -> Path:
        """Held by the launcher of this machine that works in the folder."""
        return self.out / ("launch.lock" if self.kind == "launch" else "lock")

    def programs(self) -> list[Node]:
        """All that run as jobs of their own."""
        return [program for node in self.nodes for program in node.programs()]

    def keep(self) -> None:
        """Write OUT/config.yaml; the folder is ours and locked."""
        if self.config is not None:
            write_text(self.out / "config.yaml", dump(self.config))

    def check(self, stage: bool = False) -> None:
        """Refuse, before anything is touched, what cannot go well: raises UserError.

        Programs that are not there; a folder that holds something else, another graph, or nodes that were started with
        another config.
        stage: it is a sweep in a pipeline. Its points may not be trained for longer, as those of a sweep on its own
        may: the stages after it have used them.
        """
        root = snapshot.code_root()
        programs = {(getattr(p.config, "evaluation", None), getattr(p.config, "ema", None)): p for p in self.programs()}
        for program in programs.values():
            evaluations.check(program.config)
        if self.kind == "sweep":
            program_exists(self.module, root)
        else:
            for node in self.nodes:
                program_exists(node.module, root, f"stage {node.name}: " if self.kind == "pipeline" else "")
                if node.sweep is not None:
                    node.sweep.check(stage=True)
        if self.kind != "launch" and self.out.is_dir():
            self._check_folder(stage)

    def _check_folder(self, stage: bool) -> None:
        kept = self.out / "config.yaml"
        if not kept.exists():
            if any(path.name != "lock" for path in self.out.iterdir()):
                raise UserError(f"{self.out} is not empty and holds no {self.kind}; choose another --out")
            return
        earlier = load(kept, kind=self.kind)
        if self.kind == "pipeline" and earlier.title != self.title:
            raise UserError(f"{self.out} holds another pipeline ({earlier.title!r}); choose another --out")
        if self.kind == "sweep":
            if earlier.module != self.module:
                raise UserError(
                    f"{self.out} holds a sweep of {earlier.module}, not of {self.module}; choose another --out"
                )
            names = {point.name for point in self.nodes}
            others = [job.folder.name for job in started_in(self.out) if job.folder.name not in names]
            if others:
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                raise UserError(
                    f"{self.out} holds points that this sweep does not have ({others[0]}{more}): it was started with "
                    "another file; choose another --out"
                )
        problems = [text for node in self.nodes if (text := self._changed(node, stage))]
        if problems:
            raise UserError("\n".join(problems))

    def _changed(self, node: Node, stage: bool) -> str:
        if node.sweep is not None:
            return ""  # it has checked itself
        changed = "; ".join(node.changes(as_run=self.kind == "sweep" and not stage))
        if not changed:
            return ""
        what, written = f"{self.out}: point {node.name}", ""
        if self.kind == "pipeline":
            what = f"stage {node.name}"
            inside = [path.relative_to(self.out) for path in node.produces if path.is_relative_to(self.out)]
            written = "".join(f" and {path}" for path in sorted({self.out / path.parts[0] for path in inside}))
        return (
            f"{what} was started with another config ({changed}): choose another --out, or delete "
            f"{node.folder}{written}"
        )


def program_exists(module: str, root: Path, where: str = "") -> None:
    """Raises UserError unless ``python -m module`` would find a program of ours."""
    file = root.joinpath(*module.split("."))
    if not file.with_suffix(".py").is_file() and not (file / "__main__.py").is_file():
        raise UserError(f"{where}module {module}: there is no such program in {root}")


def single(module: str, config: Section, ranks: int = 1) -> Graph:
    """One program on its own (``llamagen launch``). Raises UserError for a config of nothing that runs.

    Its folder is the config's run_dir; a program with ``out`` instead gets OUT.launch beside it, since what is there
    belongs to the results alone.
    """
    config = absolute(config)
    if isinstance(config, PipelineConfig):
        raise UserError("a pipeline file is run by: llamagen pipeline FILE --out DIR")
    out, run_dir = getattr(config, "out", None), getattr(config, "run_dir", None)
    if out is None and run_dir is None:
        raise UserError(f"kind {getattr(config, 'kind', '?')}: no program runs with such a config")
    folder = Path(out).with_name(Path(out).name + ".launch") if out is not None else Path(str(run_dir))
    node = Node(name=folder.name, module=module, folder=folder, ranks=ranks, config=config)
    return Graph("launch", module, folder, (node,))


def absolute(config: Section) -> Section:
    """The same config with every path absolute: jobs run in the snapshot, not where the command was typed."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, tuple):
            return tuple(walk(inner) for inner in value)
        return value.absolute() if isinstance(value, Path) else value

    return type(config).model_validate(walk(config.model_dump()))
