"""A GPT shared by two ranks draws the tokens that it draws on one, plainly, in windows and with int8 weights."""

from typing import Any

import torch

from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel import tensor_parallel
from llamagen_dist.parallel.tensor_parallel import merge
from llamagen_dist.parallel.topology import start
from llamagen_dist.sampling import int8
from llamagen_dist.sampling.sampler import generate
from tests.ranks.forked import run_ranks

KINDS = [{}, {"cfg_scale": 3.0, "top_k": 9}, {"cfg_scale": 3.0, "guidance": "step", "window": 4}]


def model() -> GPT:
    config = GPTConfig(
        2, 4, 32, vocab_size=24, image_tokens=16, num_classes=3, multiple_of=16, n_kv_head=2, qk_norm=True
    )
    gpt = GPT(config).initialize(0).eval()
    with torch.no_grad():
        for number, weight in enumerate(gpt.parameters()):
            weight.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return gpt


def drawn(gpt: GPT) -> list[torch.Tensor]:
    return [generate(gpt, torch.arange(12) % 3, **options) for options in KINDS]


def draw_on_two() -> dict[str, Any]:
    """What the two ranks draw together, with all bits and with eight; then the same with a wrong order of the ranks'
    codes; and int8 weights whose scales are those of whole rows, and of a rank's own part of them."""
    topology = start(tensor=2)
    shared = tensor_parallel.apply(model(), topology)
    seen = {"right": drawn(shared)}
    gather = shared.gather_vocabulary
    shared.gather_vocabulary = lambda logits: gather(logits).roll(12, -1)
    seen["wrong"] = drawn(shared)
    shared.gather_vocabulary = gather
    own = int8.Int8Linear(shared.layers[0].attention.wo.weight).weight
    seen["int8"] = drawn(int8.quantize(shared, topology))
    seen["weights"] = {name: buffer for name, buffer in shared.named_buffers() if buffer.dtype == torch.int8}
    return seen | {"own": own}


def test_two_ranks_draw_the_tokens_of_one():
    alone, ranks = drawn(model()), run_ranks(draw_on_two, 2)
    rounded = int8.quantize(model())
    for seen in ranks:
        assert all(torch.equal(a, b) for a, b in zip(seen["right"], alone, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(seen["wrong"], alone, strict=True)), "sabotage twin"
        assert all(torch.equal(a, b) for a, b in zip(seen["int8"], drawn(rounded), strict=True))
    whole = {name: buffer for name, buffer in rounded.named_buffers() if buffer.dtype == torch.int8}
    assert ranks[0]["weights"].keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(merge(name, [seen["weights"][name] for seen in ranks], group=2), weight), name
    wo = "layers.0.attention.wo.weight"
    assert not torch.equal(merge(wo, [seen["own"] for seen in ranks]), whole[wo]), (
        "twin: a scale of the rank's own part"
    )
