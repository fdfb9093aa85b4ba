"""The model on a device against the reference system's numbers (tests/golden)."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES
from llamagen_dist.sampling.sampler import generate
from tests.gpu.table import Row, below
from tests.unit.test_gpt import GOLDEN, NO_DROPOUT, recipe, tiny

LIMITS = {  # precision -> (logits, loss, gradient); bf16: a few times what its 8 bits did on a CPU
    "fp32": (1e-4, 1e-5, 1e-5),
    "bf16": (2e-1, 2e-2, 5e-2),
}


def largest(found: Tensor, wanted: np.ndarray) -> float:
    return float((found.detach().float().cpu() - torch.from_numpy(wanted).float()).abs().max())


def rows(device: torch.device, small: bool) -> Iterator[Row]:
    """small: leave GPT-B out."""
    for precision in ("fp32", "bf16"):
        yield from of_classes(device, precision)
        yield from of_captions(device, precision)
        if not small:
            yield from of_gpt_b(device, precision)
    yield from of_sampling(device)


def ready(model: GPT, device: torch.device, precision: str) -> GPT:
    model = model.to(device).train()
    return model.bfloat16() if precision == "bf16" else model


def of_classes(device: torch.device, precision: str) -> Iterator[Row]:
    golden = np.load(GOLDEN / "gpt_c2i.npz")
    model = ready(tiny("class", golden), device, precision)
    tokens, labels = (torch.from_numpy(golden[key]).to(device) for key in ("tokens", "labels"))
    logits, nats, slope = LIMITS[precision]
    name = f"parity, class, {precision}"
    yield below(name, "tiny model, logits", largest(model(tokens, labels), golden["logits"]), logits)
    loss = model.loss(tokens, labels)
    yield below(name, "tiny model, loss", largest(loss, golden["loss"]), nats)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter, key in (("layers.0.attention.wqkv.weight", "grad_wqkv0"), ("tok_embeddings.weight", "grad_tok")):
        scale = float(np.abs(golden[key]).max())
        yield below(
            name, f"relative gradient of {parameter}", largest(gradients[parameter], golden[key]) / scale, slope
        )


def of_captions(device: torch.device, precision: str) -> Iterator[Row]:
    golden = np.load(GOLDEN / "gpt_t2i.npz")
    model = ready(tiny("text", golden), device, precision)
    tokens, features, present, valid = (
        torch.from_numpy(golden[key]).to(device) for key in ("tokens", "caption", "emb_mask", "valid")
    )
    logits, nats, _ = LIMITS[precision]
    name = f"parity, text, {precision}"
    caption = (features, present.bool())
    yield below(name, "tiny model, logits", largest(model(tokens, caption), golden["logits"]), logits)
    yield below(name, "tiny model, loss", largest(model.loss(tokens, caption, weights=valid), golden["loss"]), nats)


def of_gpt_b(device: torch.device, precision: str) -> Iterator[Row]:
    golden = np.load(GOLDEN / "gptb_recipe.npz")
    model = GPT(GPTConfig(**GPT_SIZES["GPT-B"], **NO_DROPOUT))
    with torch.no_grad():
        recipe(model)
        model = ready(model, device, precision)
        tokens, labels = (torch.from_numpy(golden[key]).to(device) for key in ("tokens", "labels"))
        found = model(tokens, labels)
    logits, nats, _ = LIMITS[precision]
    worst = largest(found[:, ::17, ::997], golden["logits_head"])
    yield below(f"parity, class, {precision}", "GPT-B, logits", worst, logits)
    nll = F.cross_entropy(found.float().flatten(0, 1), tokens.long().flatten())
    yield below(f"parity, class, {precision}", "GPT-B, loss", largest(nll, golden["loss"]), nats)


def of_sampling(device: torch.device) -> Iterator[Row]:
    golden = np.load(GOLDEN / "gpt_c2i.npz")
    model = tiny("class", golden).to(device).eval()
    labels = torch.from_numpy(golden["labels"]).to(device)
    for cfg, key in ((1.0, "greedy_nocfg"), (2.0, "greedy_cfg2")):
        found = generate(model, labels, cfg_scale=cfg, temperature=0.0).cpu().numpy()
        same = int((found == golden[key]).sum())
        yield Row(
            "parity, sampling, fp32",
            f"greedy tokens, guidance {cfg:g}",
            f"{same} of {found.size} equal",
            "all",
            same == found.size,
        )
