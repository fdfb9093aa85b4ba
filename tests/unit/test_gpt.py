"""The GPT against numbers made by the reference system (tests/golden) and the published parameter counts."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamagen_dist.models.cost import parameters, total_parameters
from llamagen_dist.models.gpt import GPT, GPTConfig, rotary_table
from llamagen_dist.models.sizes import GPT_SIZES

GOLDEN = Path(__file__).parent.parent / "golden"
NO_DROPOUT = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0}
PUBLISHED = {  # class-conditional, text-conditional
    "GPT-B": (110_888_448, 112_282_368),
    "GPT-L": (342_910_976, 345_031_680),
    "GPT-XL": (774_699_520, 777_678_080),
    "GPT-XXL": (1_410_972_672, 1_414_940_160),
    "GPT-XXXL": (3_893_027_840, 3_902_261_760),
    "GPT-1B": (1_199_616_000, 1_205_954_560),
    "GPT-3B": (3_096_659_200, 3_110_249_600),
    "GPT-7B": (6_614_589_440, 6_635_655_168),
}


def tiny(condition: str, golden: np.lib.npyio.NpzFile) -> GPT:
    weights = {key[2:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("w/")}
    num_classes = weights["cls_embedding.embedding_table.weight"].shape[0] - 1 if condition == "class" else 1000
    model = GPT(
        GPTConfig(
            n_layer=sum("attention.wo" in k for k in weights),
            n_head=4,
            dim=64,
            vocab_size=128,
            image_tokens=16,
            condition=condition,
            num_classes=num_classes,
            prefix_tokens=None if condition == "class" else 6,
            caption_dim=32,
            multiple_of=32,
            **NO_DROPOUT,
        )
    )
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def c2i() -> tuple[GPT, np.lib.npyio.NpzFile]:
    golden = np.load(GOLDEN / "gpt_c2i.npz")
    return tiny("class", golden), golden


def test_class_conditional_matches_the_reference(c2i):
    model, golden = c2i
    tokens, labels = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["labels"])
    model.train()
    assert torch.allclose(rotary_table(model.config), torch.from_numpy(golden["freqs"]), atol=1e-6)
    assert torch.allclose(model(tokens, labels), torch.from_numpy(golden["logits"]), atol=1e-4)
    loss = model.loss(tokens, labels)
    assert abs(loss.item() - float(golden["loss"])) < 1e-5
    loss.backward()
    for name, key in [
        ("layers.0.attention.wqkv.weight", "grad_wqkv0"),
        ("tok_embeddings.weight", "grad_tok"),
    ]:
        gradient = dict(model.named_parameters())[name].grad
        assert torch.allclose(gradient, torch.from_numpy(golden[key]), atol=1e-6), name


def test_the_loss_is_the_same_in_eval_mode(c2i):
    model, golden = c2i
    tokens, labels = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["labels"])
    assert model.train().loss(tokens, labels).item() == model.eval().loss(tokens, labels).item()


def greedy(model: GPT, labels: torch.Tensor, cfg: float) -> torch.Tensor:
    null = torch.full_like(labels, model.config.num_classes)
    tokens = torch.zeros(len(labels), model.config.image_tokens, dtype=torch.int64)
    with torch.no_grad():
        for t in range(model.config.image_tokens):
            logits = model(tokens, labels)[:, t]
            if cfg > 1:
                free = model(tokens, null)[:, t]
                logits = free + cfg * (logits - free)
            tokens[:, t] = logits.argmax(-1)
    return tokens


@pytest.mark.parametrize(("key", "cfg"), [("greedy_nocfg", 1.0), ("greedy_cfg2", 2.0)])
def test_greedy_tokens_equal_the_reference(c2i, key, cfg):
    model, golden = c2i
    assert torch.equal(
        greedy(model.eval(), torch.from_numpy(golden["labels"]), cfg), torch.from_numpy(golden[key]).long()
    )


def test_an_identity_rotation_of_the_prefix_would_be_seen(c2i):
    """Sabotage twin: the 'correct' cos = 1 for the prefix must not pass the golden logits."""
    model, golden = c2i
    kept = model.rotary.clone()
    model.rotary[0, :, 0] = 1.0
    logits = model(torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["labels"]))
    model.rotary.copy_(kept)
    assert (logits - torch.from_numpy(golden["logits"])).abs().max() > 1e-2


def test_text_conditional_matches_the_reference():
    golden = np.load(GOLDEN / "gpt_t2i.npz")
    model = tiny("text", golden)
    caption = (torch.from_numpy(golden["caption"]), torch.from_numpy(golden["emb_mask"]).bool())
    tokens = torch.from_numpy(golden["tokens"])
    assert torch.allclose(model(tokens, caption), torch.from_numpy(golden["logits"]), atol=1e-4)
    loss = model.loss(tokens, caption, weights=torch.from_numpy(golden["valid"]))
    assert abs(loss.item() - float(golden["loss"])) < 1e-5


def recipe(model: GPT) -> None:
    """Weights by the recipe that the golden files were made with: each tensor drawn from its own name."""
    for name, tensor in model.state_dict().items():
        drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape)).astype(np.float32)
        scaled = drawn / np.sqrt(np.prod(drawn.shape[1:])) if drawn.ndim >= 2 else 1 + 0.05 * drawn
        tensor.copy_(torch.from_numpy(scaled.astype(np.float32)))


@pytest.mark.long
def test_gpt_b_matches_the_reference_at_full_size():
    golden = np.load(GOLDEN / "gptb_recipe.npz")
    model = GPT(GPTConfig(**GPT_SIZES["GPT-B"], **NO_DROPOUT))
    with torch.no_grad():
        recipe(model)
        tokens, labels = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["labels"])
        logits = model(tokens, labels)
    assert torch.allclose(logits[:, ::17, ::997], torch.from_numpy(golden["logits_head"]), atol=1e-4)
    nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert abs(nll.item() - float(golden["loss"])) < 1e-5


@pytest.mark.parametrize("size", GPT_SIZES)
def test_parameter_counts_are_the_published_ones(size):
    for condition, count in zip(("class", "text"), PUBLISHED[size], strict=True):
        config = GPTConfig(**GPT_SIZES[size], condition=condition)
        assert total_parameters(config) == count
        if size == "GPT-B":
            with torch.device("meta"):
                model = GPT(config)
            assert sum(p.numel() for p in model.parameters()) == count
            assert sum(parameters(config).values()) == count


def test_first_loss_is_the_logarithm_of_the_vocabulary():
    model = GPT(GPTConfig(2, 2, 32, vocab_size=512, image_tokens=16, num_classes=10, **NO_DROPOUT)).initialize(0)
    loss = model.loss(torch.randint(512, (4, 16)), torch.tensor([0, 1, 9, 10]))
    assert abs(loss.item() - np.log(512)) < 1e-5


def test_dropout_masks_depend_on_the_sample_not_on_its_place_in_the_batch():
    config = GPTConfig(2, 2, 32, vocab_size=64, image_tokens=16, num_classes=10, multiple_of=16)
    model = GPT(config).initialize(1).train()
    torch.nn.init.normal_(model.output.weight, std=0.1)
    tokens, labels, ids = torch.randint(64, (6, 16)), torch.arange(6), torch.arange(6) + 2**33
    together = model(tokens, labels, ids)
    order = torch.tensor([3, 0, 5])
    assert torch.allclose(model(tokens[order], labels[order], ids[order]), together[order], atol=1e-6)
    assert (model(tokens, labels, ids + 1) - together).abs().max() > 1e-2, "other samples must get other masks"
    with pytest.raises(ValueError, match="sample_ids"):
        model(tokens, labels)


def test_dropout_keeps_the_right_share():
    from llamagen_dist import prng
    from llamagen_dist.models.gpt import Randomness

    random = Randomness(prng.stream(0, "dropout", torch.arange(64)))
    kept = (random.dropout(torch.ones(64, 100, 100), 0.1, 0) > 0).float().mean()
    assert abs(kept - 0.9) < 5 * (0.09 / 640_000) ** 0.5  # five standard errors
    again = random.dropout(torch.ones(64, 100, 100), 0.1, 1)
    assert abs(((again > 0).float()).mean() - 0.9) < 5 * (0.09 / 640_000) ** 0.5
