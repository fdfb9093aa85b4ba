"""PROGRAM: guidance scale, schedule, temperature, top-k and top-p searched for the best FID (or another metric).

    torchrun --nproc-per-node=8 -m eval.search CONFIG checkpoint=RUN tokenizer=RUN reference=PATH out=DIR

also plain ``python -m`` for one rank, or ``srun``. At every point the same samples are drawn with the same classes and
the same noise, decoded and scored without a file of them; the ranks share out the samples. A finished point is a file
OUT/points/NAME.json, which eval.compare reads, and the same command again measures those that are missing.
"""

import json
import time
from pathlib import Path
from typing import Any

from llamagen_dist.config import SearchConfig, load
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import passport, scoring
from llamagen_dist.evaluation.image_sets import ImageSet, open_images
from llamagen_dist.evaluation.redrawn import RedrawnScores
from llamagen_dist.evaluation.search import Measured, Point, next_point, summary
from llamagen_dist.files import OutputFolder, as_json, json_if_there, write_bytes, write_text
from llamagen_dist.parallel.topology import Topology, full_fp32, start
from llamagen_dist.program import run as run_program
from llamagen_dist.report import files, plots
from llamagen_dist.report import search as shown
from llamagen_dist.sampling.numbered import NumberedPictures
from llamagen_dist.tracking.evaluations import SET
from llamagen_dist.tracking.provenance import versions

# of the config: what decides no number, and paths, whose content has a hash instead
_LEFT_OUT: dict[str, Any] = {
    **dict.fromkeys(("out", "threads", "checkpoint", "tokenizer", "captions", "reference"), True),
    "inception": {"cache"},
}


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m eval.search CONFIG checkpoint=PATH tokenizer=PATH reference=PATH out=DIR")
    config: SearchConfig = load(argv[0], argv[1:], kind="search")
    topology = start(threads=config.threads)
    full_fp32()
    Search(config, topology).run()


class Search:
    """One search in its folder, point by point."""

    def __init__(self, config: SearchConfig, topology: Topology) -> None:
        self.config, self.topology, self.numbered = config, topology, NumberedPictures(config, topology)
        conditions, self.reference = self.numbered.conditions, _reference(config)
        if conditions.kind == "class" and config.images < conditions.count:
            raise UserError(
                f"images: {config.images} do not show each of the {conditions.count} classes once; give at least "
                f"{conditions.count}"
            )
        identity = config.model_dump(mode="json", exclude=_LEFT_OUT)
        identity |= self.numbered.identity(config.images, ["model"]) | {"reference": _about(self.reference)}
        self.output = OutputFolder(config.out, identity, what="points of a search", key="out")
        self.points = config.out / "points"
        self.results = [config.out / name for name in ("search.json", "search.md", "search.png")]
        self.scorer: RedrawnScores | None = None
        self.reference_sha256: str | None = None

    def run(self) -> None:
        """Measure what is missing, then write the results (collective; UserErrors on every rank)."""
        began, metric = time.monotonic(), self.config.metric
        if self.topology.broadcast_from_rank0(self._begin):
            self.topology.log0(f"{self.config.out}: complete already")
            return
        measured: dict[Point, Measured] = {}
        while (point := self._next({one: known.mean(metric) for one, known in measured.items()})) is not None:
            measured[point] = self._measured(point)
            value, deviation = measured[point].mean(metric), measured[point].deviation(metric)
            band = "" if deviation is None else f" ± {deviation:.3g}"
            self.topology.log0(f"point {len(measured)}: {point.name}: {metric} {value:.5g}{band}")
        self.topology.broadcast_from_rank0(lambda: self._finish(list(measured.values()), time.monotonic() - began))

    def _begin(self) -> bool:
        if self.output.finished(self.results) is not None:
            return True
        some = list(self.points.glob("*"))  # before there is a point, a corrected config may take the folder
        self.output.begin([*self.results, *some], refuse_empty=bool(some))
        self.points.mkdir(exist_ok=True)
        return False

    def _next(self, values: dict[Point, float]) -> Point | None:
        return self.topology.broadcast_from_rank0(lambda: next_point(self.config, values))

    def _measured(self, point: Point) -> Measured:
        """A point with all seeds, from its files or measured now (collective)."""
        results = [self._result(point, seed) for seed in self.config.noises]
        values = [result["sets"][SET] for result in results]
        return Measured(
            point,
            {metric: [one[metric] for one in values] for metric in values[0] if metric != "n"},
            results[0]["fid_replicates"],
        )

    def _result(self, point: Point, seed: int) -> dict[str, Any]:
        file = self.points / f"{point.name}_seed-{seed}.json"
        result = self.topology.broadcast_from_rank0(lambda: json_if_there(file))
        if result is None:
            self.scorer = self.scorer or RedrawnScores(self.config, self.topology, self.numbered, self.reference)
            made = as_json(self.scorer.score(point, seed))
            result = self.topology.broadcast_from_rank0(lambda: self._written(file, made))
        self._same_reference(result)
        return result

    def _written(self, file: Path, made: dict[str, Any]) -> dict[str, Any]:
        self._same_reference(made)
        scoring.write(file, made)
        return made

    def _same_reference(self, result: dict[str, Any]) -> None:
        sha256 = result["record"]["sets"][SET]["reference"]["sha256"]
        self.reference_sha256 = self.reference_sha256 or sha256
        if self.reference_sha256 != sha256:
            raise UserError(
                f"reference: {self.config.reference} is not what {self.points} was measured against; restore it, or "
                "choose another out"
            )

    def _finish(self, measured: list[Measured], seconds: float) -> None:
        """search.json, the table, the picture, the record. Rank 0 only."""
        content = summary(self.config, measured)
        write_text(self.results[0], json.dumps(content, indent=1, allow_nan=False) + "\n")
        text = "\n\n".join(files.markdown(shown.section(content), lambda _: "![search.png](search.png)"))
        write_text(self.results[1], text + "\n")
        write_bytes(self.results[2], plots.draw(shown.figure(content), "png"))
        self.output.finish(
            {
                "checkpoint": str(self.config.checkpoint),
                "tokenizer": str(self.config.tokenizer),
                "device": str(self.topology.device.type),
                "ranks": self.topology.world,
                "seconds_of_the_last_start": round(seconds, 2),
                "versions": versions("torch", "numpy"),
            }
        )
        self.topology.log0(shown.verdict(content))


def _reference(config: SearchConfig) -> ImageSet:
    """Raises UserError: not there, or fewer images than are drawn."""
    reference = open_images(config.reference, config.image_size, reference=True, resize_to=config.resize_to)
    if not reference.statistics and reference.count < config.images:
        raise UserError(
            f"reference: {config.reference} holds {reference.count} images, fewer than the {config.images} that every "
            "point draws; lower images, or give more"
        )
    return reference


def _about(reference: ImageSet) -> dict[str, Any]:
    stored = passport.statistics_sha256(reference) if reference.statistics else None
    return {**passport.provenance(reference), "size": [reference.width, reference.height], "statistics": stored}


if __name__ == "__main__":
    run_program(main)
