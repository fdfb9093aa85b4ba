"""trackio as a sink: a dashboard on this machine (``trackio show``), in an SQLite file under TRACKIO_DIR."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamagen_dist.config.training import TrackioSection
from llamagen_dist.errors import UserError
from llamagen_dist.tracking.shown import public_config, run_id


class TrackioSink:
    """One run directory's trackio run, called NAME.ID, since trackio tells runs by their names."""

    def __init__(self, folder: Path, section: TrackioSection) -> None:
        self._folder, self._section = folder, section
        self._name = f"{section.name or folder.resolve().name}.{run_id(folder)}"
        self.where = f"trackio run {self._name}"
        self._run: Any = None
        self._scores: list[Mapping[str, float]] = []

    def open(self) -> int:
        try:
            import trackio
        except ImportError:
            raise UserError("tracking.trackio needs the extra: pip install 'llamagen-dist[trackio]'") from None

        self._run = trackio.init(
            project=self._section.project,
            name=self._name,
            group=self._section.group,
            space_id=self._section.space,
            config=public_config(self._folder),
            resume="allow",
            embed=False,
        )
        return int(self._run._next_step)  # after the last that the project's file, or the Space, has

    def row(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        import trackio

        images = {name: trackio.Image(str(path)) for name, path in pictures.items()}
        self._run.log({**values, **images}, step=step)
        self._send_scores(step)  # never before the rows up to its step: the last step says where to go on

    def evaluation(self, values: Mapping[str, float]) -> bool:
        from trackio.sqlite_storage import SQLiteStorage

        sent = SQLiteStorage.get_logs(self._section.project, self._name)
        new = values["eval/step"] not in {row.get("eval/step") for row in sent}
        if new:
            self._scores.append(values)
        return new

    def settle(self) -> None:
        self._send_scores(math.inf)

    def _send_scores(self, until: float) -> None:
        """At the step of their checkpoint, for checkpoints up to step ``until``."""
        ready = [values for values in self._scores if values["eval/step"] <= until]
        self._scores = [values for values in self._scores if values["eval/step"] > until]
        for values in ready:
            self._run.log(dict(values), step=int(values["eval/step"]))

    def checkpoint(self, folder: Path) -> bool:
        return False  # trackio has no references

    def scores(self, values: Mapping[str, float | str]) -> int:
        return 0  # ... and no summary

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._run.finish()
