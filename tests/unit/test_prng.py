"""Random numbers by position: golden values (a change would reorder every old run) and quality."""

import torch

from llamagen_dist import prng


def test_golden_values():
    """Computed once with the definition in the module's text; written down here for ever."""
    assert prng.bits(0, "order", 0).item() == 3989081146
    assert prng.bits(1, "order", torch.arange(4)).tolist() == [2867991180, 3904521036, 1096940272, 1108732513]
    wide = prng.bits(2**40 + 7, "dropout", torch.tensor([2**33 + 5]), torch.arange(3))
    assert wide.tolist() == [1936314462, 3071353069, 3780687482]


def reference_mix(x: int) -> int:
    """The finaliser in plain unsigned arithmetic."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def test_mix_is_the_published_function():
    values = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 123456789]
    signed = torch.tensor([v - (1 << 32) if v >= 1 << 31 else v for v in values], dtype=torch.int32)
    assert prng.mix(signed).view(torch.uint32).tolist() == [reference_mix(v) for v in values]


def test_uniform_numbers_are_uniform_and_streams_are_independent():
    u = prng.uniform(3, "noise", torch.arange(500)[:, None], torch.arange(1000))
    n = u.numel()
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert u.min() >= 0
    assert u.max() < 1 + 1e-7
    correlation = torch.corrcoef(u[:64])
    assert (correlation - torch.eye(64)).abs().max() < 6 / 1000**0.5


def test_seed_purpose_sample_and_position_all_matter():
    base = prng.bits(1, "a", 2, 3).item()
    others = [
        prng.bits(2, "a", 2, 3),
        prng.bits(1, "b", 2, 3),
        prng.bits(1, "a", 3, 3),
        prng.bits(1, "a", 2, 4),
        prng.bits(1 + 2**32, "a", 2, 3),
        prng.bits(1, "a", 2 + 2**32, 3),
    ]
    assert len({base, *(o.item() for o in others)}) == 7


def test_integers_cover_their_range_evenly():
    counts = prng.integers(3, "crop", torch.arange(100_000), 10).bincount(minlength=10)
    assert ((counts - 10_000).abs() < 5 * (100_000 * 0.09) ** 0.5).all()
