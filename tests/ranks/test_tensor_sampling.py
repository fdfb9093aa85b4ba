"""A GPT shared by two ranks draws the tokens that it draws on one, plainly and in windows."""

import torch

from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel import tensor_parallel
from llamagen_dist.parallel.topology import start
from llamagen_dist.sampling.sampler import generate
from tests.ranks.forked import run_ranks

KINDS = [{}, {"cfg_scale": 3.0, "top_k": 9}, {"cfg_scale": 3.0, "guidance": "step", "window": 4}]


def model() -> GPT:
    config = GPTConfig(2, 4, 32, vocab_size=24, image_tokens=16, num_classes=3, multiple_of=16, n_kv_head=2)
    gpt = GPT(config).initialize(0).eval()
    with torch.no_grad():
        for number, weight in enumerate(gpt.parameters()):
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return gpt


def drawn(gpt: GPT) -> list[torch.Tensor]:
    return [generate(gpt, torch.arange(12) % 3, **options) for options in KINDS]


def draw_on_two() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the two ranks draw together; then the same with a wrong order of the ranks' codes."""
    shared = tensor_parallel.apply(model(), start(tensor=2))
    right, gather = drawn(shared), shared.gather_vocabulary
    shared.gather_vocabulary = lambda logits: gather(logits).roll(12, -1)
    return right, drawn(shared)


def test_two_ranks_draw_the_tokens_of_one():
    alone = drawn(model())
    for right, wrong in run_ranks(draw_on_two, 2):
        assert all(torch.equal(a, b) for a, b in zip(right, alone, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(wrong, alone, strict=True)), "sabotage twin"
