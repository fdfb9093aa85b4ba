"""Sampling and decoding, one after the other and beside each other: the order of the work, and its results."""

import numpy as np
import pytest
import torch

from llamagen_dist.errors import UserError
from llamagen_dist.models.vq import VQConfig, VQModel
from llamagen_dist.sampling.chunks import Chunk
from llamagen_dist.sampling.pictures import decode_tokens, decoded
from llamagen_dist.sampling.stages import Stages

CHUNKS = [Chunk("model", 0, range(4)), Chunk("model", 1, range(4, 8)), Chunk("unigram", 0, range(3))]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(VQConfig(8, (1, 1), res_blocks=1, z_channels=8, codebook_size=64, codebook_dim=4)).eval()


def codes(chunk: Chunk) -> torch.Tensor:
    """A whole batch of four, also for the last chunk."""
    return (torch.arange(64).view(4, 16) * (chunk.samples.start + 3)) % 64


class Logged:
    """Stages over CHUNKS, and what was done in which order; the chunk numbered ``bad`` fails in one of them."""

    def __init__(self, tokenizer: VQModel, beside: bool, bad: tuple[str, int] = ("", 0)) -> None:
        self.tokenizer, self.bad, self.log = tokenizer, bad, []
        self.stages = Stages(self.sample, self.decode, CPU, beside)

    def step(self, stage: str) -> bool:
        self.log.append(stage)
        return self.bad == (stage, self.log.count(stage) - 1)

    def sample(self, chunk: Chunk) -> torch.Tensor:
        if self.step("sample"):
            raise RuntimeError("out of memory")
        return codes(chunk)

    def decode(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, finite = decoded(self.tokenizer, tokens)
        return pixels, finite & torch.tensor(not self.step("decode"))

    def results(self) -> list[tuple[Chunk, np.ndarray]]:
        found = []
        for chunk, arrays in self.stages.run(CHUNKS):
            self.log.append(f"got {len(found)}")
            found.append((chunk, arrays["images"]))
        return found


def test_both_orders_give_the_same_pictures(tokenizer):
    one, two = Logged(tokenizer, beside=False), Logged(tokenizer, beside=True)
    for (chunk, images), (other, beside), expected in zip(one.results(), two.results(), CHUNKS, strict=True):
        assert chunk == other == expected
        assert np.array_equal(images, beside)
        assert np.array_equal(images, decode_tokens(tokenizer, codes(chunk))[: len(chunk.samples)])
        assert len(images) == len(chunk.samples)
    assert not np.array_equal(decode_tokens(tokenizer, codes(CHUNKS[0])), decode_tokens(tokenizer, codes(CHUNKS[1])))
    assert one.log == ["sample", "decode", "got 0", "sample", "decode", "got 1", "sample", "decode", "got 2"]
    assert two.log == ["sample", "decode", "sample", "decode", "got 0", "sample", "decode", "got 1", "got 2"]
    assert {name: spent.images for name, spent in two.stages.spent.items()} == {"model": 8, "unigram": 3}
    assert all(spent.sampling > 0 and spent.decoding > 0 for spent in two.stages.spent.values())


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_was_made_before_a_failure_is_given_first(tokenizer, beside, number):
    name = ("model, samples 0 to 3", "model, samples 4 to 7", "unigram, samples 0 to 2")[number]
    failures = ("decode", UserError, f"^{name}: the tokenizer decodes"), ("sample", RuntimeError, "out of memory")
    for stage, error, words in failures:
        work = Logged(tokenizer, beside, (stage, number))
        with pytest.raises(error, match=words):
            work.results()
        assert [line for line in work.log if line.startswith("got")] == [f"got {n}" for n in range(number)]
