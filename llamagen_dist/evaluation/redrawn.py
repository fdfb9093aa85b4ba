"""Scores of what one GPT draws with many settings: the reference is looked at once, and no picture becomes a file."""

from typing import Any

import numpy as np

from llamagen_dist.config import EvaluateConfig, SearchConfig
from llamagen_dist.console import main_rank_progress
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import inception_weights, scoring
from llamagen_dist.evaluation.bands import bootstrap_fid
from llamagen_dist.evaluation.comparison import Comparison
from llamagen_dist.evaluation.drawn import drawn_images
from llamagen_dist.evaluation.features import Extraction, Selection, SetFeatures
from llamagen_dist.evaluation.image_sets import ImageSet
from llamagen_dist.evaluation.search import Point
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.sampling.numbered import NumberedPictures
from llamagen_dist.tracking.evaluations import SET


class RedrawnScores:
    """The extractor, and the reference's features (collective). Raises UserError where either cannot be had, or does
    not fit the pictures."""

    def __init__(
        self, config: SearchConfig, topology: Topology, numbered: NumberedPictures, reference: ImageSet
    ) -> None:
        self.config, self.topology, self.numbered = config, topology, numbered
        extractor = inception_weights.open_extractor(config.inception)
        if isinstance(extractor, str):
            raise UserError(f"no search without the extractor: {extractor}")
        self.network, self.about = extractor.network.to(topology.device), extractor.record
        shared = ("metrics", "batch", "keep", "resize_to", "manifold", "inception_score", "inception")
        evaluation = EvaluateConfig(
            kind="evaluate",
            protocol="search",
            generated=config.checkpoint,
            reference=config.reference,
            out=config.out,
            limit=config.images,
            subsample=config.keep if config.images > config.keep else None,
            scores="samples",
            **{key: getattr(config, key) for key in shared},
        )
        first = drawn_images(numbered, config.images, config.resize_to)
        self.comparison = Comparison(evaluation, {config.checkpoint: first, config.reference: reference})
        self.comparison.check_statistics(self.about)
        if self.network.fc is None and "inception_score" in config.metrics:
            self.comparison.leave_out("inception_score", inception_weights.NO_LOGITS)
        self.reference = self._features(self.comparison.selections[1:], "reference")

    def _features(self, selections: list[Selection], label: str) -> list[SetFeatures]:
        extraction = Extraction(
            selections, self.network, None, self.topology, self.config.batch, self.config.inception_score
        )
        rank, world = self.topology.rank, self.topology.world
        with main_rank_progress(label, extraction.images_of_rank(), rank, world) as progress:
            return extraction.run(progress.advance if progress else lambda count, text: None)

    def score(self, point: Point, seed: int) -> dict[str, Any]:
        """What eval.evaluate would write of eval.sample's pictures with these settings, and the replicates of its FID
        (collective). Raises UserError where the metric that is searched for is absent."""
        config = self.config
        numbered = self.numbered.redrawn(seed=seed, **point.settings)
        self.comparison = self.comparison.redrawn(drawn_images(numbered, config.images, config.resize_to))
        bands = len(config.noises) == 1 and config.bootstrap > 1 and config.images <= config.keep
        drawn = self.comparison.selections[0]
        if bands:  # also where no metric needs them
            drawn = Selection(drawn.images, drawn.indices, np.arange(len(drawn)))
        (mine,) = self._features([drawn], f"{point.name}, seed {seed}")
        measured = [mine, *self.reference]
        mistakes = self.comparison.mistakes_of_features(measured)
        result = scoring.scored(self.comparison, measured, mistakes, self.topology, self.about)
        if config.metric not in result["sets"][SET]:
            why = "; ".join(f"{metric}: {reason}" for metric, reason in result["absent"].items())
            raise UserError(f"metric: {config.metric} cannot be measured here ({why})")
        reference = self.comparison.reference_gaussian(SET, measured, self.topology)
        replicates: list[float] = []
        if bands and reference is not None and mine.pool is not None:
            replicates = bootstrap_fid(mine.pool, reference, config.bootstrap, self.topology)
        return {"point": point._asdict(), "seed": seed, "fid_replicates": replicates, **result}
