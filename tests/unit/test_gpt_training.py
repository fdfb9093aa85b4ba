"""What training asks of the model: recomputation, compilation, grouped heads, dropout, one logits buffer."""

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F

from llamagen_dist import prng
from llamagen_dist.build import compile_blocks
from llamagen_dist.errors import UserError
from llamagen_dist.models import dropout, ops
from llamagen_dist.models.dropout import Randomness
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.loss import ZLoss, token_nll, weighted_nll, weighted_nll_and_z
from tests.plain_gpt import PlainGPT
from tests.unit.test_gpt import NO_DROPOUT

TOKENS = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(0))
LABELS, IDS = torch.tensor([0, 3, 9, 10]), torch.tensor([5, 6, 7, 2**33])


QK_NORM = {"qk_norm": True, "n_kv_head": 2, "z_loss": 0.1}


def small(**options) -> GPT:
    config = {"n_layer": 4, "n_head": 4, "dim": 64, "vocab_size": 96, "image_tokens": 16, "num_classes": 10}
    model = GPT(GPTConfig(**{**config, "multiple_of": 32, "initializer_range": 0.2, **options})).initialize(1).train()
    torch.nn.init.normal_(model.output.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):  # not 1, which would hide where they are multiplied
                p.copy_(torch.linspace(0.5, 2.0, len(p)) + (name.count("k_norm") + int(name.split(".")[1])) / 8)
    return model


def step(model: GPT, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = model.loss(TOKENS, LABELS, ids)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- recomputation ---


@pytest.mark.parametrize(
    "options", [{}, {"attn_dropout_p": 0.2, "n_kv_head": 2}, {"drop_path_rate": 0.3}, QK_NORM], ids=str
)
def test_recomputation_changes_no_bit(options):
    model = small(**options)
    loss, gradients = step(model)
    assert step(model, IDS + 1)[0] != loss, "dropout is on"
    for every in (1, 2, 3):
        model.recompute_every = every
        again, recomputed = step(model)
        assert again == loss
        assert same(recomputed, gradients)


def test_recomputation_with_other_masks_is_noticed(monkeypatch):
    """Sabotage twin: masks from a counter, as a stateful generator would give them."""
    model, calls = small(), [0]
    own = Randomness._site_keys

    def counted(self, site):
        calls[0] += 1
        return own(self, site + 100 * calls[0])

    monkeypatch.setattr(Randomness, "_site_keys", counted)
    _, gradients = step(model)
    calls[0], model.recompute_every = 0, 1
    assert not same(step(model)[1], gradients)


def saved_bytes(model: GPT) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, weights aside, shared memory once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is used twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.loss(TOKENS, LABELS, IDS)
    return sum(storage.nbytes() for storage in kept.values())


def test_recomputation_keeps_little_more_than_the_blocks_inputs():
    model = small(n_layer=6)
    everything = saved_bytes(model)
    model.recompute_every = 1
    inputs = 6 * 4 * 16 * 64 * 4
    rest = everything - saved_bytes_of_blocks(6)
    assert saved_bytes(model) < inputs + rest + 40_000
    assert saved_bytes(model) < 0.35 * everything
    model.recompute_every = 2
    assert saved_bytes(model) < 0.7 * everything


def saved_bytes_of_blocks(layers: int, **options: bool) -> int:
    return layers * (saved_bytes(small(n_layer=2, **options)) - saved_bytes(small(n_layer=1, **options)))


def test_a_block_keeps_what_its_file_says():
    """models/gpt.py states the activations that one block keeps; more would be a memory leak, less a wrong plan."""
    batch, length, dim, ffn, heads = 4, 16, 64, 192, 4
    elements = length * batch * (8 * dim + 2 * ffn)
    rows = length * batch * (2 + heads)
    masks = 2 * length * batch * dim
    assert saved_bytes_of_blocks(1) == 4 * (elements + rows) + masks
    normed = length * batch * (2 * dim + 2 * heads)
    assert saved_bytes_of_blocks(1, qk_norm=True) == 4 * (elements + rows + normed) + masks


def test_a_pass_changes_no_module():
    """What a pass needs goes down as an argument: modules can be shared between passes, and compiled."""
    model = small(n_layer=2)
    before = [dict(vars(module)) for module in model.modules()]
    for model.recompute_every in (0, 1, 2):
        step(model)
    model.recompute_every = 0
    assert [dict(vars(module)) for module in model.modules()] == before


# --- compilation ---


@pytest.mark.long
def test_compiled_equals_eager_with_dropout_on():
    model = small(n_layer=2, n_kv_head=2)
    loss, gradients = step(model)
    names = [name for name, _ in model.named_parameters()]
    model.compile_blocks()
    again, compiled = step(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert abs(loss - again) < 1e-6
    for one, other in zip(compiled, gradients, strict=True):  # a wrong bit in a mask is worth a thousand times that
        assert (one - other).abs().max() < 1e-5 * other.abs().max() + 1e-9
    assert abs(step(model, IDS + torch.tensor([0, 0, 0, 1]))[0] - loss) > 1e-4, "sabotage twin: one sample's masks"


def test_the_formulas_for_compilation_are_the_eager_ones(monkeypatch):
    """Eagerly run: masks to the bit, and everything else to rounding."""
    x, y = torch.randn(4, 16, 64), random_of().at(3)
    kept = y.kept(x, 0.1, 0)
    steps = [step(small()), step(small(**QK_NORM))]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(y.kept(x, 0.1, 0), kept)
    assert not torch.equal(y.kept(x, 0.1, 1), kept)
    for (loss, gradients), (again, plain) in zip(steps, [step(small()), step(small(**QK_NORM))], strict=True):
        assert abs(again - loss) < 1e-6
        for a, b in zip(plain, gradients, strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max() + 1e-6


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    model = small(n_layer=1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"compute\.compile: .* no-such-compiler is not found; install g\+\+"):
        compile_blocks(model, torch.device("cpu"))
    assert model.layers[0]._compiled_call_impl is None
    compile_blocks(model, torch.device("cuda"))  # needs none
    assert model.layers[0]._compiled_call_impl is not None


# --- grouped-query attention ---


def repeated(model: GPT, full: GPT) -> None:
    """Weights of ``full`` := those of ``model``, each key and value head as often as it has query heads."""
    state = model.state_dict()
    width, kv = model.config.dim, model.config.kv_dim
    for name in [name for name in state if "wqkv" in name]:
        q, k, v = state[name].split([width, kv, kv])
        group = model.config.n_head // model.config.kv_heads
        k, v = (part.unflatten(0, (-1, 16)).repeat_interleave(group, 0).flatten(0, 1) for part in (k, v))
        state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_repeated_ones(kv_heads):
    model, full = small(n_kv_head=kv_heads, attn_dropout_p=0.1), small(attn_dropout_p=0.1)
    repeated(model, full)
    assert step(model)[0].item() == pytest.approx(step(full)[0].item(), abs=1e-5)
    model.eval()
    full.eval()
    assert torch.allclose(model(TOKENS, LABELS), full(TOKENS, LABELS), atol=1e-4)
    wrong = full.state_dict()
    name = "layers.0.attention.wqkv.weight"
    wrong[name] = torch.cat([wrong[name][:64], wrong[name][64:].roll(16, 0)])
    full.load_state_dict(wrong)
    assert not torch.allclose(model(TOKENS, LABELS), full(TOKENS, LABELS), atol=1e-2), "sabotage twin"


@torch.no_grad()
def test_grouped_heads_have_a_smaller_cache():
    for options in ({}, QK_NORM):
        model = small(**{**options, "n_kv_head": 1}).eval()
        logits, cache = model.prefill(LABELS)
        found = [logits, *(model.decode(TOKENS[:, t], cache) for t in range(15))]
        assert torch.allclose(torch.stack(found, 1), model(TOKENS, LABELS), atol=1e-4)
    assert cache.layers[0]._keys.shape == (4, 1, 16, 16)


# --- gradients of the parts ---


def test_loss_and_gradients_equal_a_plain_implementation():
    for options in ({}, {"n_kv_head": 2}, {"qk_norm": True}, QK_NORM):
        model = small(**NO_DROPOUT, **options)
        plain = PlainGPT(model.config)
        plain.load_state_dict(model.state_dict())
        loss, gradients = step(model)
        expected = plain.loss(TOKENS, LABELS)
        assert abs(loss - expected.detach()) < 1e-5
        for one, other in zip(gradients, torch.autograd.grad(expected, list(plain.parameters())), strict=True):
            assert (one - other).abs().max() < 1e-4 * other.abs().max()
    plain.z_loss = 0.0
    assert abs(loss - plain.loss(TOKENS, LABELS)) > 1e-2, "sabotage twin: z-loss forgotten"
    model.eval()
    assert abs(model.loss(TOKENS, LABELS) - plain.loss(TOKENS, LABELS)) < 1e-5, "no validation loss has it"
    plain.layers[1].attention.q_norm.weight.data.add_(0.1)
    assert abs(model.loss(TOKENS, LABELS) - plain.loss(TOKENS, LABELS)) > 1e-4, "sabotage twin: another norm"


@pytest.mark.parametrize("part", ["rms_norm", "gated", "split_and_rotate", "norm_and_rotate"])
def test_written_gradients_are_true(part):
    """Against finite differences, in the precision they compute in."""
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(3, 2, 2, generator=draw)
    shapes = {
        "rms_norm": [(2, 3, 8), (8,)],
        "gated": [(2, 3, 8)] * 2,
        "split_and_rotate": [(2, 3, 16)],
        "norm_and_rotate": [(2, 3, 16), (4,), (4,)],
    }[part]
    inputs = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    apply = {
        "rms_norm": lambda x, w: ops.rms_norm(x, w, 1e-5),
        "gated": ops.gated,
        "split_and_rotate": lambda x: torch.cat(ops.split_and_rotate(x * 1.0, table, 2, 4), dim=-2),
        "norm_and_rotate": lambda x, q, k: torch.cat(
            ops.split_and_rotate(x * 1.0, table, 2, 4, ops.HeadNorms(q, k, 1e-5)), dim=-2
        ),
    }[part]
    torch.autograd.gradcheck(apply, inputs, eps=1e-2, atol=2e-2, rtol=2e-2)
    with pytest.raises(RuntimeError):
        torch.autograd.gradcheck(lambda *x: apply(*x) + 0.1 * x[0].detach().sum(), inputs, eps=1e-2, atol=2e-2)


def through_products(context) -> list[torch.Tensor]:
    """Gradients of a graph that saves the gated product flattened, transposed and scaled, and others of its size."""
    draw = torch.Generator().manual_seed(0)
    a, b, weight = (torch.randn(8, 8, generator=draw).requires_grad_() for _ in range(3))
    product = ops.gated(a, b)
    with context(product, a, b):
        total = (product.view(4, 16).square().sum() + product.t().square().matmul(weight).sum()).square()
        for number in range(20):  # each takes memory of the product's size, and leaves it to the next
            total = total + (product * number).sin().square().sum()
    del product
    return list(torch.autograd.grad(total, [a, b, weight]))


def test_only_the_product_itself_is_recomputed(monkeypatch):
    """A saved tensor is told by its address, which another one might get: not while the product is held."""
    expected = through_products(lambda *_: contextlib.nullcontext())
    assert same(through_products(ops.recomputed), expected)
    monkeypatch.setattr(ops, "is_whole", lambda x, product: x.numel() == product.numel())
    assert not same(through_products(ops.recomputed), expected), "sabotage twin: told by its size alone"


def test_the_product_is_held_no_longer_than_its_layer_runs():
    a, b = torch.randn(2, 8, 8).requires_grad_().unbind()
    product = ops.gated(a, b)
    layer, gone = torch.nn.Linear(8, 8, bias=False), weakref.ref(product)
    with ops.recomputed(product, a, b):
        out = layer(product)
        del product
        assert gone() is not None, "else its address could be given away"
    assert gone() is None
    del out
    product = ops.gated(a, b)
    gone = weakref.ref(product)
    out = layer(product)
    del product
    assert gone() is not None, "sabotage twin: a layer alone keeps its input"
    del out


# --- the loss ---


def test_the_chunked_loss_equals_cross_entropy(monkeypatch):
    monkeypatch.setattr("llamagen_dist.models.loss.CPU_CHUNK", 4 * 96)
    draw = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(50, 96, generator=draw) * 5, torch.randint(96, (50,), generator=draw)
    logits[0] *= 40  # a probability of zero in fp32
    weights = torch.rand(50, generator=draw)
    plain = logits.clone().requires_grad_()
    expected = (F.cross_entropy(plain, tokens, reduction="none") * weights).sum()
    (wanted,) = torch.autograd.grad(3 * expected, plain)
    for nll in (token_nll, lambda few, chosen: token_nll(few, chosen)):  # the second as tensor parallelism plugs in
        leaf = logits.clone().requires_grad_()
        loss = weighted_nll(leaf * 1.0, tokens, weights, nll)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        (found,) = torch.autograd.grad(3 * loss, leaf)
        assert torch.allclose(found, wanted, atol=1e-6)
        with torch.no_grad():
            assert weighted_nll(logits, tokens, weights, nll).item() == pytest.approx(expected.item(), rel=1e-6)
    (off,) = torch.autograd.grad(weighted_nll(leaf * 1.0, tokens.roll(1), weights), leaf)
    assert not torch.allclose(3 * off, wanted, atol=1e-2), "sabotage twin"


def test_the_chunked_z_loss_equals_its_formula(monkeypatch):
    monkeypatch.setattr("llamagen_dist.models.loss.CPU_CHUNK", 4 * 96)
    draw = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(50, 96, generator=draw) * 5, torch.randint(96, (50,), generator=draw)
    weights, z = torch.rand(50, generator=draw) / 50, ZLoss(0.1, lambda few: few.logsumexp(-1))
    plain = logits.clone().requires_grad_()
    square = (plain.logsumexp(-1).square() * weights).sum()
    expected = (F.cross_entropy(plain, tokens, reduction="none") * weights).sum() + 0.1 * square
    (wanted,) = torch.autograd.grad(3 * expected, plain)
    for nll in (token_nll, lambda few, chosen: token_nll(few, chosen)):  # the second as tensor parallelism plugs in
        leaf = logits.clone().requires_grad_()
        loss, squares = weighted_nll_and_z(leaf * 1.0, tokens, weights, nll, z)
        assert (loss.item(), squares.item()) == pytest.approx((expected.item(), square.item()), rel=1e-6)
        assert not squares.requires_grad
        (found,) = torch.autograd.grad(3 * loss, leaf)
        assert torch.allclose(found, wanted, atol=1e-6)
    (without,) = torch.autograd.grad(3 * weighted_nll(leaf * 1.0, tokens, weights), leaf)
    assert not torch.allclose(without, wanted, atol=1e-4), "sabotage twin"


def test_logits_exist_once():
    """The gradient takes their place, and nothing of their size is kept beside them."""
    leaf = torch.randn(64, 4096, requires_grad=True)
    logits = leaf * 1.0
    place = logits.data_ptr()
    loss = weighted_nll(logits, torch.zeros(64, dtype=torch.int64), torch.ones(64))
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert found.data_ptr() == place
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, logits)


def test_samples_can_be_left_out_of_the_loss():
    model = small().eval()
    with torch.no_grad():
        chosen = model.loss(TOKENS, LABELS, weights=torch.tensor([1.0, 0.0, 1.0, 0.0]))
        assert chosen.item() == pytest.approx(model.loss(TOKENS[::2], LABELS[::2]).item(), abs=1e-6)
        assert model.loss(TOKENS, LABELS, weights=torch.zeros(4)) == 0


# --- dropout ---


def random_of(ids: torch.Tensor = IDS) -> Randomness:
    return Randomness(prng.stream(0, "dropout", ids))


def test_a_part_of_the_sequence_sees_its_part_of_the_masks():
    x, whole = torch.ones(4, 16, 64), random_of()
    kept = whole.kept(x, 0.1, 0)
    assert torch.equal(whole.at(5).kept(x[:, 5:9], 0.1, 0), kept[:, 5:9])
    assert not torch.equal(whole.at(4).kept(x[:, 5:9], 0.1, 0), kept[:, 5:9])
    assert whole.first == 0, "immutable"


def test_heads_of_another_rank_see_their_masks():
    whole = random_of().attention_dropout(torch.ones(4, 6, 8, 8), 0.3, 2, 0)
    assert torch.equal(random_of().attention_dropout(torch.ones(4, 2, 8, 8), 0.3, 2, 4), whole[:, 4:])
    assert not torch.equal(random_of().attention_dropout(torch.ones(4, 2, 8, 8), 0.3, 2, 2), whole[:, 4:])


def test_sites_samples_and_neighbours_are_independent():
    x = torch.ones(4, 64, 256)
    masks = [random_of().layer(n).kept(x, 0.5, place).float() for n in (0, 1) for place in (0, 1)]
    flat = torch.cat([mask.flatten(1) for mask in masks])
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5
    for lag in (1, 2, 256):
        pair = torch.corrcoef(torch.stack([flat[:, lag:].flatten(), flat[:, :-lag].flatten()]))
        assert abs(pair[0, 1]) < 5 / flat.numel() ** 0.5, lag


def test_attention_dropout_is_unbiased_and_only_in_training():
    assert small(attn_dropout_p=0.0).layers[0].attention.dropout_p == 0
    model = small(attn_dropout_p=0.3, **NO_DROPOUT)
    dropped, _ = step(model)
    assert dropped != step(small(**NO_DROPOUT))[0]
    assert torch.equal(model.eval()(TOKENS, LABELS), small(**NO_DROPOUT).eval()(TOKENS, LABELS))
    share = random_of().attention_dropout(torch.ones(4, 4, 64, 64), 0.3, 2, 0).mean()
    assert abs(share - 1) < 5 * (0.3 / 0.7 / 65536) ** 0.5


def test_the_scale_is_that_of_the_probability_really_used():
    assert dropout.threshold(0.1) == 6554
    assert dropout.scale(0.1) == pytest.approx(1 / 0.9, rel=1e-4)
    assert dropout.threshold(1e-6) == 0


def test_mixing_in_place_is_mixing():
    x = torch.randint(-(2**31), 2**31 - 1, (1000,), dtype=torch.int32)
    assert torch.equal(prng.mix_(x.clone(), torch.empty_like(x)), prng.mix(x))
