"""Thousands of pictures, through both stages and onto the disk: memory does not grow with them."""

from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch

from llamagen_dist.checkpoint.checkpoint import ALONE
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.vq import VQConfig, VQModel
from llamagen_dist.sampling.chunks import Chunk, ChunkFolder, write_npz
from llamagen_dist.sampling.pictures import Settings, decoded, model_tokens, sample_seeds
from llamagen_dist.sampling.stages import Stages
from tests.bench.sample import resident
from tests.runs.memory_growth import growth_alone

COUNT, BATCH, CLASSES = 4000, 40, 3
SETTINGS = Settings(cfg_scale=2.0, top_k=20)


def growth(out: Path, keep: bool, beside: bool) -> float:
    """MB, from the second fifth of the pictures to the last one and the results, by their medians."""
    model = GPT(GPTConfig(1, 2, 32, vocab_size=64, image_tokens=16, num_classes=CLASSES, multiple_of=16))
    model.initialize(0).eval()
    vq = VQModel(VQConfig(8, (1, 1, 1, 1), res_blocks=1, z_channels=8, codebook_size=64, codebook_dim=4)).eval()
    output = ChunkFolder(out, {}, ["model.npz"], ALONE, ["model"], COUNT, BATCH)
    kept, seen = [], []

    def sample(chunk: Chunk) -> torch.Tensor:
        numbers = torch.arange(chunk.samples.start, chunk.samples.start + BATCH)
        return model_tokens(model, numbers % CLASSES, sample_seeds(0, numbers), SETTINGS)

    def made(chunks):
        for chunk, arrays in Stages(sample, partial(decoded, vq), torch.device("cpu"), beside).run(chunks):
            seen.append(resident("VmRSS"))
            kept.append(arrays if keep else None)
            yield chunk, arrays

    missing = output.missing()
    assert missing is not None
    output.make(missing, "samples", made)
    write_npz(out / "model.npz", None, COUNT, (arrays["images"] for _, arrays in output.load("model")))
    fifth = len(seen) // 5
    seen[-1] = max(seen[-1], resident("VmRSS"))
    return median(seen[-fifth:]) - median(seen[fifth : 2 * fifth])


@pytest.mark.long
def test_memory_does_not_grow_with_the_pictures(tmp_path):
    """4,000 pictures of 3 kB: the twin that keeps every batch has at least 7 MB more."""
    assert growth_alone(__name__, tmp_path / "sampled", False, True) < 3
    assert growth_alone(__name__, tmp_path / "twin", True, False) > 6
