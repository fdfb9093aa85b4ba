"""torch.compile of the decoding step: the tokens of the eager one."""

import numpy as np
import pytest
import torch

from llamagen_dist.errors import UserError
from llamagen_dist.models.cache import Cache
from llamagen_dist.sampling.compiled import CompiledSteps
from llamagen_dist.sampling.int8 import quantize
from llamagen_dist.sampling.sampler import generate
from tests.unit.test_gpt import tiny
from tests.unit.test_sampler import GOLDEN, OPTIONS


@pytest.mark.long  # the compiler takes seconds
@pytest.mark.parametrize(("kind", "options"), [("class", {"cfg_interval": 5}), ("text", {"window": 3})])
def test_compiled_steps_draw_the_eager_tokens(kind, options, monkeypatch):
    """With the null half dropped on the way; in windows, with captions and int8 weights; each in a second batch over
    the memory of the first. The twin hides one slot too many."""
    torch.compiler.reset()
    golden = np.load(GOLDEN / ("gpt_t2i.npz" if kind == "text" else "gpt_c2i.npz"))
    model = tiny(kind, golden).eval()
    conditions = [torch.arange(6) % 3, (torch.arange(6) + 1) % 3]
    if kind == "text":
        quantize(model)
        features, present = torch.from_numpy(golden["caption"]), torch.from_numpy(golden["emb_mask"]).bool()
        conditions = [(features, present), (features.flip(0), present.flip(0))]
    steps = CompiledSteps(model)
    memory = set()
    for condition in conditions:
        expected = generate(model, condition, **OPTIONS, **options)
        assert torch.equal(generate(model, condition, steps=steps, **OPTIONS, **options), expected)
        memory.add(steps._cache.layers[0].memory[0].data_ptr())
    assert len(memory) == 1
    window = Cache.window

    def shifted(self, *given):
        """What the mask, or the term added to the logits, hides is one slot earlier."""
        positions, mask = window(self, *given)
        hidden = torch.full_like(mask[..., :1], False if mask.dtype == torch.bool else -torch.inf)
        return positions, torch.cat([mask[..., 1:], hidden], dim=-1)

    monkeypatch.setattr(Cache, "window", shifted)
    assert not torch.equal(generate(model, conditions[1], steps=steps, **OPTIONS, **options), expected)


def test_without_a_compiler_the_key_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = tiny("class", np.load(GOLDEN / "gpt_c2i.npz"))
    with pytest.raises(UserError, match=r"^compile: on a CPU torch.compile needs a C\+\+ compiler and no-such"):
        CompiledSteps(model)
