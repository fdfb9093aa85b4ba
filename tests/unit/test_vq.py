"""The tokenizer against the reference system's numbers: names, latents, codes, pictures, gradients."""

import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamagen_dist.models import quantizer as quantizer_module
from llamagen_dist.models.quantizer import VectorQuantizer
from llamagen_dist.models.vq import VQ_SIZES, VQConfig, VQModel, code_histogram, group_norm

GOLDEN = Path(__file__).parent.parent / "golden"
# entries, parameters, sha256 of the sorted "name shape" lines of the reference system's state dict
REFERENCE = {
    "VQ-8": (300, 70_109_835, "6824de071ade312b391471b1a203bda5cd2cb12ad3f7d93ad48db132f53918b6"),
    "VQ-16": (344, 71_883_403, "25666a85ab873be97b7cb016ec80c2e554a56da54b872c6f2a01cc0e5a591048"),
}
TINY = VQConfig(channels=8, channel_multipliers=(1, 1, 2), res_blocks=1, z_channels=16, codebook_size=64)


def recipe(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weights of the golden files: every tensor follows from its own name."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        values = values / np.float32(np.sqrt(np.prod(shape[1:])))
    elif name.endswith(".bias"):
        values = np.float32(0.05) * values
    else:
        values = 1 + np.float32(0.05) * values
    return torch.from_numpy(np.asarray(values, np.float32))


def fill(model: VQModel) -> None:
    state = {
        name: value if name == "quantize.codebook_used" else recipe(name, tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)


def fingerprint(model: VQModel) -> str:
    lines = sorted(f"{name} {list(value.shape)}" for name, value in model.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module", params=["VQ-8", "VQ-16"])
def released(request: pytest.FixtureRequest) -> tuple[str, VQModel, dict[str, Tensor]]:
    with torch.device("meta"):
        model = VQModel(VQConfig(**VQ_SIZES[request.param]))
    model = model.to_empty(device="cpu").eval()
    model.quantize.codebook_used.zero_()
    fill(model)
    with np.load(GOLDEN / f"{request.param.lower().replace('-', '')}_recipe.npz", allow_pickle=False) as file:
        return request.param, model, {name: torch.from_numpy(file[name]) for name in file.files}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_names_shapes_and_counts_are_the_reference_systems(released):
    size, model, _ = released
    entries, parameters, digest = REFERENCE[size]
    assert len(model.state_dict()) == entries
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert fingerprint(model) == digest


@torch.no_grad()
def test_pictures_codes_and_latents_match_the_reference_system(released):
    _, model, golden = released
    latents = model.latents(golden["x"])
    assert relative(latents, golden["latent"]) < 1e-4
    _, _, codes = model.quantize(latents)
    assert torch.equal(codes.flatten(), golden["indices"])
    assert relative(model.decode(codes), golden["recon"]) < 1e-4
    # ... and the tolerance is one that a real deviation misses: one transposed weight of 344.
    weight = model.encoder.mid[1].q.weight
    kept = weight.detach().clone()
    weight.copy_(kept.transpose(0, 1))
    assert relative(model.latents(golden["x"]), golden["latent"]) > 1e-3
    weight.copy_(kept)


@pytest.fixture
def quantizer() -> tuple[VectorQuantizer, dict[str, Tensor]]:
    with np.load(GOLDEN / "quantizer.npz", allow_pickle=False) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    module = VectorQuantizer(64, 8, l2_norm=True)
    module.load_state_dict({"embedding.weight": golden["codebook"], "codebook_used": torch.zeros(65536)})
    return module, golden


def test_quantizer_matches_the_reference_system_in_losses_and_gradients(quantizer):
    module, golden = quantizer
    z = golden["z"].clone().requires_grad_()
    quantised, losses, codes = module(z, entropy=True)
    assert torch.equal(codes.flatten(), golden["indices"])
    assert torch.allclose(quantised, golden["zq"], atol=1e-6)
    assert losses.vq.item() == pytest.approx(golden["vq"].item(), rel=1e-6)
    assert 0.25 * losses.commit.item() == pytest.approx(golden["commit"].item(), rel=1e-6)
    assert 0.1 * losses.entropy.item() == pytest.approx(golden["entropy"].item(), rel=1e-5)
    (losses.vq + 0.25 * losses.commit + 0.1 * losses.entropy + quantised.sum()).backward()
    assert relative(z.grad, golden["grad_z"]) < 1e-5
    assert relative(module.embedding.weight.grad, golden["grad_codebook"]) < 1e-5


def test_a_wrong_commitment_weight_would_be_seen_in_the_gradient(quantizer):
    module, golden = quantizer
    z = golden["z"].clone().requires_grad_()
    quantised, losses, _ = module(z, entropy=True)
    (losses.vq + 1.0 * losses.commit + 0.1 * losses.entropy + quantised.sum()).backward()
    assert relative(z.grad, golden["grad_z"]) > 1e-4


def test_the_gradient_goes_straight_through_to_the_unit_latents(quantizer):
    module, golden = quantizer
    z, weights = golden["z"].clone().requires_grad_(), torch.randn(golden["z"].shape)
    (module(z)[0] * weights).sum().backward()
    again = golden["z"].clone().requires_grad_()
    (F.normalize(again, dim=1) * weights).sum().backward()
    assert torch.allclose(z.grad, again.grad, atol=1e-6)
    assert module.embedding.weight.grad is None or not module.embedding.weight.grad.any()


@pytest.mark.parametrize("l2_norm", [True, False])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), codes=st.integers(1, 40), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_search_in_pieces_finds_the_nearest_code(l2_norm, rows, codes, width, seed):
    generator = torch.Generator().manual_seed(seed)
    module = VectorQuantizer(codes, width, l2_norm)
    with torch.no_grad():
        module.embedding.weight.copy_(torch.randn(codes, width, generator=generator))
    z = module.prepare(torch.randn(1, width, 1, rows, generator=generator)).reshape(-1, width)
    whole, kept = module.nearest(z), quantizer_module.SEARCH_ELEMENTS
    quantizer_module.SEARCH_ELEMENTS = 3 * codes  # three rows at a time
    try:
        assert torch.equal(module.nearest(z), whole)
    finally:
        quantizer_module.SEARCH_ELEMENTS = kept
    distance = torch.cdist(z.double(), module.codes_as_vectors().detach().double())
    chosen = distance.gather(1, whole[:, None]).squeeze(1)
    assert torch.all(chosen <= distance.min(1).values + 1e-5)


def test_codes_are_searched_in_fp32_under_bf16_autocast():
    torch.manual_seed(0)
    module = VectorQuantizer(4096, 8, l2_norm=True)
    latents = torch.randn(4, 8, 16, 16).bfloat16()
    expected = module.nearest(module.prepare(latents.float()).reshape(-1, 8))
    with torch.autocast("cpu", torch.bfloat16):
        quantised, losses, codes = module(latents)
        rows = module.prepare(latents).reshape(-1, 8)
        again = module.nearest(rows)
    assert torch.equal(codes.flatten(), expected)
    assert torch.equal(again, expected)
    assert quantised.dtype == losses.vq.dtype == torch.float32
    # What a search in bf16 would have done: another code for a few percent of the tokens.
    careless = (rows.bfloat16() @ module.codes_as_vectors().bfloat16().t()).argmax(-1)
    assert 0.01 < (careless != expected).float().mean() < 0.5


@torch.no_grad()
def test_encode_and_decode_are_the_two_halves_of_the_training_pass():
    torch.manual_seed(0)
    model, images = VQModel(TINY), torch.randn(2, 3, 32, 32)
    reconstruction, losses, codes = model(images)
    assert torch.equal(model.encode(images), codes)
    assert torch.allclose(model.decode(codes), reconstruction, atol=1e-5)
    assert not torch.allclose(model.decode(codes.flip(-1)), reconstruction, atol=1e-2)
    assert losses.entropy is None  # nobody asked for the tokens x codes matrix


def test_encode_under_autocast_equals_a_search_of_the_same_latents():
    torch.manual_seed(0)
    model, images = VQModel(TINY), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = model.latents(images)
        codes = model.encode(images)
    assert latents.dtype == torch.bfloat16
    assert torch.equal(codes.flatten(), model.quantize.nearest(model.quantize.prepare(latents).reshape(-1, 8)))


def test_training_mode_changes_no_buffer_and_no_weight():
    torch.manual_seed(0)
    model = VQModel(TINY).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    reconstruction, losses, codes = model(torch.randn(2, 3, 32, 32))
    (reconstruction.square().mean() + losses.vq + losses.commit).backward()
    assert codes.shape == (2, 8, 8)
    assert codes.dtype == torch.int64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is not None for p in model.parameters())


def test_histograms_add_up_to_exact_usage():
    codes = torch.tensor([[[0, 3], [3, 3]], [[5, 0], [7, 3]]])
    whole = code_histogram(codes, 8)
    assert whole.tolist() == [2, 0, 0, 4, 0, 1, 0, 1]
    assert torch.equal(code_histogram(codes[0], 8) + code_histogram(codes[1], 8), whole)
    assert int((whole > 0).sum()) == 4


def test_new_codebooks_have_unit_rows_and_plain_ones_stay_within_1_over_k():
    unit, plain = (
        VectorQuantizer(256, 8, True).embedding.weight,
        VectorQuantizer(256, 8, False).embedding.weight,
    )
    assert torch.allclose(unit.norm(dim=-1), torch.ones(256), atol=1e-6)
    assert 0.9 / 256 < plain.abs().max() <= 1 / 256


@pytest.mark.parametrize(
    ("channels", "groups"), [(128, 32), (512, 32), (16, 16), (24, 24), (48, 24), (40, 20), (37, 1)]
)
def test_group_norm_takes_the_largest_divisor_up_to_32(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_sizes_that_cannot_be_cut_into_tokens_are_refused():
    with pytest.raises(ValueError, match=r"30, 32.*4 x 4"):
        VQModel(TINY).latents(torch.zeros(1, 3, 30, 32))
    assert VQConfig(**VQ_SIZES["VQ-16"]).downsampling == 16
    assert VQConfig(**VQ_SIZES["VQ-8"]).downsampling == 8
