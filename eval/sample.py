"""PROGRAM: pictures from a trained GPT, and from the baselines it has to beat.

    torchrun --nproc-per-node=8 -m eval.sample CONFIG checkpoint=RUN tokenizer=RUN out=DIR

also plain ``python -m`` for one rank, or ``srun``. The same command again resumes where it was cut off. Sample i has
class (or caption, with ``captions=``) i modulo their number and its own noise, and is always computed at the same
position of the same batch shape, so the files' bytes do not depend on the number of ranks.
"""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.config import SampleConfig, load
from llamagen_dist.data.shards import Shards, open_shards
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.files import json_if_there, write_text
from llamagen_dist.parallel.topology import Topology, full_fp32, start
from llamagen_dist.program import run as run_program
from llamagen_dist.sampling import pictures
from llamagen_dist.sampling.chunks import Chunk, ChunkFolder, write_npz
from llamagen_dist.sampling.grid import class_grid, save, shown_classes
from llamagen_dist.sampling.load import Tokenizer, TrainedGPT
from llamagen_dist.sampling.numbered import NumberedPictures
from llamagen_dist.sampling.stages import Stages
from llamagen_dist.tracking.provenance import versions

PER_CLASS = 10
MEANING = {
    "model": "drawn from the trained GPT",
    "untrained": (
        "drawn, without truncation, from the same GPT with its initial weights, whose head is zero as LlamaGen's is: "
        "every code is equally likely at every position, so these are uniformly random codes, decoded"
    ),
    "unigram": "every code drawn on its own from the histogram of the training tokens (all crops), decoded",
}


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError("usage: python -m eval.sample CONFIG checkpoint=PATH tokenizer=PATH out=DIR [key=value …]")
    config: SampleConfig = load(argv[0], argv[1:], kind="sample")
    topology = start(config.tensor, threads=config.threads)
    full_fp32()  # pictures are decoded as tokens were encoded
    numbered = NumberedPictures(config, topology)
    if config.batch == "auto":
        batch = topology.broadcast_from_rank0(lambda: begun(config.out))
        numbered.together = batch or numbered.fitting_batch(config.images, topology)
    tokens = training_tokens(config, numbered.gpt, numbered.tokenizer) if "unigram" in config.sets else None
    Sampling(config, topology, numbered, tokens).run()


def begun(out: Path) -> int | None:
    """The batch of the pictures that a folder holds already, finished or not; None: it holds none."""
    for file in (out / "record.json", out / ".parts" / "job.json"):
        batch = (json_if_there(file) or {}).get("batch")
        if isinstance(batch, int) and batch > 0:
            return batch
    return None


def training_tokens(config: SampleConfig, gpt: TrainedGPT, tokenizer: Tokenizer) -> Shards:
    """The token shards whose histogram ``unigram`` draws from. Raises UserError: not there, of another tokenizer."""
    folder = config.tokens or gpt.tokens
    if folder is None:
        raise UserError(
            "tokens: the set unigram needs the training token shards, and the checkpoint does not lead to them; "
            "set tokens=FOLDER, or leave unigram out of sets"
        )
    shards = open_shards(folder, "tokens")
    if shards.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"tokens: {folder} was not made with the tokenizer {tokenizer.path}")
    return shards


class Sampling:
    """All sets of one config, chunk by chunk."""

    def __init__(
        self, config: SampleConfig, topology: Topology, numbered: NumberedPictures, tokens: Shards | None
    ) -> None:
        self.config, self.topology, self.numbered, self.tokens = config, topology, numbered, tokens
        self.histogram: Tensor | None = None
        made_from = numbered.identity(config.images, config.sets, tokens)
        results = [*(f"{name}.npz" for name in config.sets), "grid.png"]
        if numbered.conditions.kind == "caption":
            results.append("captions.json")
        self.output = ChunkFolder(
            config.out, made_from, results, topology, config.sets, config.images, numbered.together
        )

    def run(self) -> None:
        """Compute what is missing, then write the results (collective; UserErrors on every rank)."""
        began = time.monotonic()
        if (missing := self.output.missing()) is None:
            return
        if self.tokens is not None and any(chunk.set == "unigram" for chunk in missing):
            self.histogram = self._count(self.tokens)
        stages = Stages(self._codes, partial(pictures.decoded, self.numbered.tokenizer.model), self.topology.device)
        self.output.make(missing, "samples", stages.run)
        seconds, rates = time.monotonic() - began, self._rates(stages)
        self.topology.broadcast_from_rank0(lambda: self._finish(seconds, rates))
        self.topology.log0(f"{self.config.out}: {self.config.images:,} pictures each of {', '.join(self.config.sets)}")

    def _count(self, tokens: Shards) -> Tensor:
        shards = range(self.topology.dp_rank, len(tokens.manifest.shards), self.topology.dp)
        counts = pictures.code_counts(TokenReader(tokens), shards)
        return self.topology.sum(counts.to(self.topology.device)).cpu()

    def _rates(self, stages: Stages) -> dict[str, float] | None:
        """images/s of the GPT and of the tokenizer's decoder, all ranks together (collective); None: none were made."""
        mine = stages.spent.get("model") if self.topology.tp_rank == 0 else None
        spent = [one for one in self.topology.gather(mine) if one is not None]
        if not spent:
            return None
        rates = {stage: sum(one.images / getattr(one, stage) for one in spent) for stage in ("sampling", "decoding")}
        self.topology.log0(", ".join(f"{stage} {rate:.4g} images/s" for stage, rate in rates.items()))
        return {stage: round(rate, 3) for stage, rate in rates.items()}

    def _codes(self, chunk: Chunk) -> Tensor:
        """(batch, N) int64: always a whole batch, also where the last chunk has fewer samples."""
        numbers = torch.arange(chunk.samples.start, chunk.samples.start + self.numbered.together)
        if chunk.set == "model":
            return self.numbered.tokens(numbers)
        seeds, gpt = self.numbered.seeds(numbers), self.numbered.gpt.config
        count = self.config.first_tokens or gpt.image_tokens
        if chunk.set == "untrained":
            return pictures.untrained_tokens(gpt.vocab_size, count, seeds)
        assert self.histogram is not None
        return pictures.unigram_tokens(self.histogram, count, seeds)

    def _finish(self, seconds: float, rates: dict[str, float] | None) -> None:
        """The .npz files, the grid of the first set, the captions, the record. Rank 0 only."""
        labels = self.numbered.labels(torch.arange(self.config.images)).numpy()
        conditions = self.numbered.conditions
        count = conditions.count
        shown = set(shown_classes(range(min(count, self.config.images))))
        first = np.array([label in shown for label in labels]) & (np.arange(len(labels)) < PER_CLASS * count)
        kept: list[NDArray[np.uint8]] = []
        for name in self.config.sets:
            wanted = first if name == self.config.sets[0] else np.zeros_like(first)
            write_npz(self.config.out / f"{name}.npz", labels, self.config.images, self._blocks(name, wanted, kept))
        images, words = np.concatenate(kept), conditions.name
        grid = self.config.out / "grid.png"
        save(grid, lambda: class_grid(images, labels[first], words, PER_CLASS, self._originals))
        if conditions.kind == "caption":
            used = [words(number) for number in range(min(count, self.config.images))]
            write_text(self.config.out / "captions.json", json.dumps(used, ensure_ascii=False, indent=0) + "\n")
        self.output.finish(
            {
                "checkpoint": str(self.config.checkpoint),
                "tokenizer": str(self.config.tokenizer),
                **self.numbered.describe(),
                "meaning": {name: MEANING[name] for name in self.config.sets},
                "device": str(self.topology.device),
                "ranks": self.topology.world,
                "seconds_of_the_last_start": round(seconds, 2),
                **({"images_per_s_of_the_last_start": rates} if rates else {}),
                "versions": versions("torch", "numpy"),
            }
        )

    def _originals(self, numbers: list[int]) -> NDArray[np.uint8] | None:
        """The images that held-out captions belong to, as the tokenizer shows them."""
        tokens = self.numbered.conditions.originals(numbers)
        vq = self.numbered.tokenizer.model
        return None if tokens is None else pictures.decode_tokens(vq, torch.from_numpy(tokens))

    def _blocks(
        self, name: str, wanted: NDArray[np.bool_], kept: list[NDArray[np.uint8]]
    ) -> Iterator[NDArray[np.uint8]]:
        """One set's pictures in order; those that are ``wanted`` are appended to ``kept``."""
        for chunk, arrays in self.output.load(name):
            images, chosen = arrays["images"], wanted[chunk.samples.start : chunk.samples.stop]
            if chosen.any():
                kept.append(images[chosen])
            yield images


if __name__ == "__main__":
    run_program(main)
