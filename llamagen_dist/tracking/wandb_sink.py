"""Weights & Biases as a sink."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamagen_dist.config.training import WandbSection
from llamagen_dist.errors import UserError
from llamagen_dist.files import read_json
from llamagen_dist.tracking.shown import public_config, run_id
from llamagen_dist.tracking.wandb_file import Written, written

INIT_S = 60.0  # how long the server may take to answer at all


class WandbSink:
    """One run directory's W&B run.

    Online the server says which steps it has. Offline every start leaves a file of its own in RUN/wandb, and together
    they have each step once. (``wandb sync`` would let the last of them replace the others; ``llamagen wandb-sync``
    sends the whole run, once there is a key.)
    """

    def __init__(self, folder: Path, section: WandbSection, process: int | None) -> None:
        """process: the one whose CPU and memory are watched; None: system metrics are left out."""
        self._folder, self._section, self._process = folder, section, process
        self.mode = mode_of(section)
        self._id = run_id(folder)
        self._run: Any = None
        self._before = Written()
        self._scores: list[Mapping[str, float]] = []
        self.where = ""

    def open(self) -> int:
        self._before = written(self._folder, self._id, self.mode == "offline")
        if self.mode == "offline":
            self.where = f"W&B run {self._id}, offline in {self._folder / 'wandb'}"
            return self._before.last_step + 1
        self._start()
        self.where = f"W&B run {self._run.url}"
        return int(self._run.starting_step)

    def _start(self) -> None:
        """Begin a session of the run; offline only once there is something to write."""
        import wandb

        section, online = self._section, self.mode == "online"
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            group=section.group,
            name=section.name or self._folder.resolve().name,
            tags=section.tags,
            id=self._id,
            resume="allow" if online else None,
            mode="online" if online else "offline",
            dir=self._folder,
            config=public_config(self._folder),
            allow_val_change=True,
            settings=wandb.Settings(
                # the run directory has what a run prints, and the config says the commit; an address of git's, and
                # what is printed, may hold secrets
                console="off",
                disable_code=True,
                disable_git=True,
                silent=True,
                symlink=False,
                init_timeout=INIT_S,
                x_disable_stats=self._process is None,
                x_stats_pid=self._process or os.getpid(),
            ),
        )
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    @property
    def _open_run(self) -> Any:
        if self._run is None:
            self._start()
        return self._run

    def row(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        import wandb

        images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
        self._open_run.log({**values, **images, **self._next_scores()}, step=step, commit=True)

    def evaluation(self, values: Mapping[str, float]) -> bool:
        """Into the next row, shown over its own eval/images_seen: W&B takes no row of an earlier step."""
        new = int(values["eval/step"]) not in self._before.evaluations
        if new:
            self._scores.append(values)
        return new

    def settle(self) -> None:
        """As rows behind the last; should the run be made longer, W&B lacks as many of its rows there."""
        while self._scores:
            self._open_run.log(self._next_scores(), commit=True)

    def _next_scores(self) -> Mapping[str, float]:
        if not self._scores:
            return {}
        for key in self._scores[0]:
            self._open_run.define_metric(key, step_metric="eval/images_seen")
        return self._scores.pop(0)

    def checkpoint(self, folder: Path) -> bool:
        """A reference to the folder where it lies; nothing is uploaded, nothing hashed."""
        if folder.name in self._before.checkpoints:
            return False
        import wandb

        state = read_json(folder / "state.json")
        artifact = wandb.Artifact(
            f"checkpoint-{self._id}",
            type="model",
            metadata={"path": str(folder.resolve()), "step": state["step"], "images_seen": state["images_seen"]},
        )
        artifact.add_reference(folder.resolve().as_uri(), checksum=False)
        self._open_run.log_artifact(artifact, aliases=["latest", folder.name])
        return True

    def scores(self, values: Mapping[str, float | str]) -> int:
        """Into the run's summary: a row of a step that lies behind its last one is not taken."""
        new = {key: value for key, value in values.items() if self._before.summary.get(key) != value}
        if new:
            self._open_run.summary.update(new)
        return len(new)

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        if summary.keys() - self._before.summary.keys():
            self._open_run.summary.update(dict(summary))
        if self._run is not None:
            import wandb

            self._run.finish(exit_code)
            wandb.teardown()  # only then is the whole file on disk, where the next session looks


def mode_of(section: WandbSection) -> str:
    """``online`` or ``offline``. Raises UserError where WANDB_MODE says something else."""
    if section.mode != "auto":
        return section.mode
    given = os.environ.get("WANDB_MODE", "")
    if given in ("online", "offline"):
        return given
    if given:
        raise UserError(f"WANDB_MODE={given}: set online or offline, or tracking.wandb=null to leave W&B out")
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    key = os.environ.get("WANDB_API_KEY") or settings.api_key or wbauth.read_netrc_auth(host=settings.base_url)
    return "online" if key or settings.identity_token_file else "offline"
