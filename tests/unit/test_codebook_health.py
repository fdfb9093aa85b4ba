"""Where codes start, exact usage, revival and the warning; tests/ranks/test_quantizers.py has several ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerConfigFile
from llamagen_dist.config.section import build
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.models.quantizer import VectorQuantizer
from llamagen_dist.parallel.optim import MOMENTS
from llamagen_dist.parallel.topology import Topology
from tests.image_shards import write_images
from tokenizer_training.codebook import CodebookHealth, flat_map, kmeans, perturbation
from tokenizer_training.task import TokenizerTask

CODES = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 9, 16)


def settings(folder: Path, codebook: dict[str, Any], **parts: Any) -> TokenizerConfigFile:
    return build(TokenizerConfigFile,
        {"kind": "tokenizer", "run_dir": folder / "run",
         "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8,
                   "codebook_size": CODES, "codebook_dim": 4, **parts.pop("model", {})},
         "data": {"train": folder, "validation": folder, "image_size": 16},
         "loss": {"perceptual": "none", "discriminator": {"kind": "none"}}, "optim": {"lr": 1e-3, "weight_decay": 0},
         "train": {"images": 400, "global_batch": 4, **parts.pop("train", {})}, "log": {"every_steps": 3},
         "codebook": codebook, **parts}, "test")  # fmt: skip


def task(folder: Path, codebook: dict[str, Any], **parts: Any) -> TokenizerTask:
    torch.manual_seed(0)
    config = settings(folder, codebook, **parts)
    return TokenizerTask(build_vq(config.model), config, Topology(), open_shards(folder))


def batch(step: int) -> ImageBatch:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
    return ImageBatch(images, torch.arange(4))


def train(one: TokenizerTask, steps: int) -> list[dict[str, Tensor]]:
    return [dict(one.step(batch(step), 4 * step)) for step in range(steps)]


# --- where codes start ---


def plain_lloyd(rows: Tensor, codes: Tensor, unit: bool) -> np.ndarray[Any, Any]:
    points, centres = rows.double().numpy(), codes.double().numpy().copy()
    for _ in range(10):
        nearest = ((points[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        for code in range(len(centres)):
            if (nearest == code).any():
                centres[code] = points[nearest == code].mean(0)
                if unit:
                    centres[code] /= np.linalg.norm(centres[code])
    return centres


@pytest.mark.parametrize("unit", [True, False])
def test_kmeans_is_lloyds(unit):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(400, 3, generator=generator)
    rows = F.normalize(rows, dim=-1) if unit else rows
    found = []
    for order in (torch.arange(400), torch.randperm(400, generator=generator)):
        quantizer = VectorQuantizer(12, 3, unit)
        with torch.no_grad():
            quantizer.embedding.weight.copy_(rows[:12])
            quantizer.embedding.weight[11] = 90.0 if not unit else rows[0]  # which nothing chooses
        start = quantizer.codes_as_vectors().detach().clone()
        kmeans(quantizer, rows[order])
        found.append(quantizer.embedding.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert np.allclose(found[0].numpy(), plain_lloyd(rows, start, unit), atol=1e-5)
    assert unit or torch.equal(found[0][11], start[11])
    assert not np.allclose(found[0].numpy(), start.numpy(), atol=1e-2)


def test_kmeans_starts_codes_nearer_to_the_latents(shards):
    def error(how: str) -> float:
        one = task(shards, {}, model={"codebook_init": how})
        with torch.no_grad():
            one._start_codebook(batch(0).images)
            return float(one.model(batch(0).images)[1].commit)

    assert error("kmeans") < 0.9 * error("first_batch") < error("random")


# --- usage ---


def test_usage_is_exact_over_all_steps_of_a_window(shards):
    one = task(shards, {"statistics": True}, train={"micro_batch": 1})
    seen: list[Tensor] = []
    count = one.codebook.count
    one.codebook.count = lambda codes: (seen.append(codes.clone()), count(codes))  # type: ignore[assignment]
    one.rehearse(batch(0), 0)
    seen.clear()
    lines = train(one, 6)
    assert [("train_usage" in line) for line in lines] == [True, False, True, False, False, True]
    steps = [torch.cat([codes.flatten() for codes in seen[4 * n : 4 * n + 4]]) for n in range(6)]
    for at, window in ((0, steps[:1]), (2, steps[1:3]), (5, steps[3:6])):
        share = np.bincount(torch.cat(window).numpy(), minlength=CODES) / sum(map(len, window))
        assert float(lines[at]["train_usage"]) == (share > 0).mean()
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        assert float(lines[at]["train_perplexity"]) == pytest.approx(np.exp(entropy))


def test_statistics_change_no_number(shards):
    plain, counted = task(shards, {}), task(shards, {"statistics": True})
    for one, other in zip(train(plain, 4), train(counted, 4), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        assert not [name for name in one if name.startswith("train_")]
    assert not [entry for entry in plain.entries() if entry.group == "codebook"]
    assert len([entry for entry in counted.entries() if entry.group == "codebook"]) == 3


# --- what a report shows ---


def test_the_map_is_of_the_two_widest_directions():
    generator = np.random.RandomState(0)
    vectors = (generator.randn(300, 5) * [0.1, 3.0, 0.2, 1.0, 0.3] + 7.0) @ np.linalg.qr(generator.randn(5, 5))[0]
    flat, shares = flat_map(vectors.astype(np.float32))
    left, scales, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    assert np.allclose(np.abs(flat), np.abs(left[:, :2] * scales[:2]), atol=1e-4)  # fp32 vectors; an axis has no sign
    assert np.allclose(shares, scales[:2] ** 2 / (scales**2).sum(), atol=1e-6)
    assert not np.allclose(np.abs(flat), np.abs(left[:, 1:3] * scales[1:3]), atol=0.1), (
        "sabotage twin: other directions"
    )
    again, _ = flat_map(-vectors.astype(np.float32))
    assert np.allclose(np.abs(again), np.abs(flat), atol=1e-4)
    line, share = flat_map(np.array([[1.0], [3.0]], np.float32))
    assert (line.tolist(), share.tolist()) == ([[-1.0, 0.0], [1.0, 0.0]], [1.0, 0.0])
    assert not flat_map(np.ones((4, 3), np.float32))[0].any(), "codes that are all the same"
    with pytest.raises(ValueError, match="not finite"):
        flat_map(np.array([[np.nan, 0.0]], np.float32))


@pytest.mark.parametrize("kind", [{}, {"quantizer": "fsq", "levels": [4, 8], "codebook_dim": 8}])
def test_a_validation_leaves_exact_counts_and_where_the_codes_lie(shards, kind):
    one = task(shards, {}, model=kind, validation={"images": 5, "batch": 2})
    assert not one.arrays(), "before any validation"
    usage = one.validate()["codebook_usage"]
    arrays = one.arrays()["codebook"]
    images = to_floats(load_images(open_shards(shards), range(5), 16))
    expected = np.bincount(one.model.eval().encode(images).flatten().numpy(), minlength=CODES)
    assert np.array_equal(arrays["counts"], expected)
    assert (arrays["counts"] > 0).mean() == usage
    if kind:
        assert arrays["levels"].tolist() == [4, 8]
        assert "map" not in arrays
    else:
        assert np.array_equal(arrays["map"], flat_map(one.model.quantize.codes_as_vectors().detach().numpy())[0])
        with torch.no_grad():
            one.model.quantize.embedding.weight.fill_(torch.nan)
        one.validate()
        assert set(one.arrays()["codebook"]) == {"counts"}, "codes that lie nowhere have no map"


# --- revival ---


def test_codes_that_no_step_used_move_to_latents_of_the_batch(shards):
    model = {"codebook_init": "first_batch", "l2_norm": False}
    one = task(shards, {"statistics": True, "revive_after_steps": 3}, model=model)
    train(one, 3)
    weight = one.model.quantize.embedding.weight
    state = one.generator.optimizer.state[weight]
    with torch.no_grad():  # eight codes where no latent is
        weight[:8] = 100.0 + torch.arange(8.0)[:, None]
        for moment in MOMENTS:
            state[moment][:8] = 0.0
    used: set[int] = set()
    count = one.codebook.count
    one.codebook.count = lambda codes: (used.update(codes.flatten().tolist()), count(codes))  # type: ignore[assignment]
    for step in (3, 4):
        one.step(batch(step), 4 * step)
    added, mine = one.codebook.since_line.sum(), one.codebook.mine.sum()
    assert (int(added), int(mine)) == (0, 2 * 4 * 64), "nothing is added up over the ranks where nobody looks"
    kept = weight.detach().clone()
    state["exp_avg"][:8] = 1.0
    line = one.step(batch(5), 20)
    dead = sorted(set(range(CODES)) - used)
    assert set(range(8)) <= set(dead) < set(range(CODES))
    assert float(line["revived"]) == len(dead)
    rows = one._global_rows(batch(5).images).double()
    assert torch.cdist(weight[dead].detach().double(), rows).min(1).values.max() < 1e-5
    assert torch.cdist(kept[:8].double(), rows).min(1).values.min() > 0.1, "where they were, nothing is near"
    assert all(not state[moment][dead].any() and state[moment].any() for moment in MOMENTS)
    assert len(torch.unique(weight[dead], dim=0)) == len(dead)


def test_revival_chooses_by_seed_step_and_position(shards):
    def moved(seed: int, step: int) -> Tensor:
        config = settings(shards, {"revive_after_steps": 1}, train={"seed": seed})
        quantizer = VectorQuantizer(CODES, 4, True)
        rows = F.normalize(torch.randn(100, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
        assert CodebookHealth(config, Topology(), quantizer, print).revive(step, lambda: rows) is not None
        return quantizer.embedding.weight.detach()

    assert torch.equal(moved(0, 5), moved(0, 5))
    assert not torch.equal(moved(0, 5), moved(0, 6))
    assert not torch.equal(moved(0, 5), moved(1, 5))


# --- the warning ---


@pytest.mark.parametrize(
    ("limits", "text"),
    [({"warn_below_usage": 0.5}, "used 25.0% of 32 codes"), ({"warn_below_perplexity": 0.5}, "as evenly as 8 would")],
)
def test_a_collapse_is_said_once_until_it_is_over(shards, limits, text):
    said: list[str] = []
    config = settings(shards, {"statistics": True, **limits})
    health = CodebookHealth(config, Topology(), VectorQuantizer(CODES, 4, True), said.append)
    for step, codes in enumerate((CODES, 8, 8, CODES, 8)):
        health.count(torch.arange(codes).repeat(64 // codes * 4))
        health.line(step)
    assert [line.split(":")[1] for line in said] == [" step 1", " step 4"]
    assert text in said[0]
    health = CodebookHealth(config, Topology(), VectorQuantizer(CODES, 4, True), said.append)
    health.count(torch.arange(8))
    health.line(9)
    assert len(said) == 2, "eight tokens cannot use more than eight codes"


# --- latent perturbation ---


@pytest.mark.parametrize("kind", [{}, {"quantizer": "fsq", "levels": [4, 8], "codebook_dim": 8}])
def test_perturbed_codes_are_near_ones_in_some_places_of_some_images(shards, kind):
    section = {"perturb_share": 0.3, "perturb_tokens": 0.4, "perturb_neighbours": 5}
    one = task(shards, section, model=kind)
    codes = torch.randint(CODES, (400, 8, 8), generator=torch.Generator().manual_seed(2))
    exchange = perturbation(one.config, one.model.quantize, 1000)
    assert exchange is not None
    found = exchange(codes)
    changed = (found != codes).flatten(1)
    images = changed.any(1)
    assert float(images.double().mean()) == pytest.approx(0.3, abs=0.07)
    assert float(changed[images].double().mean()) == pytest.approx(0.4, abs=0.02)
    table = one.model.quantize.lookup(torch.arange(CODES).view(1, -1, 1)).detach()[0, :, :, 0].t().double()
    distance = torch.cdist(table, table, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    fifth = distance.sort(1).values[:, 4]  # levels of FSQ have many equal distances
    moved = distance[codes[found != codes], found[found != codes]]
    assert bool((moved <= fifth[codes[found != codes]] + 1e-6).all())
    assert float(moved.max()) > 1.5 * float(moved.min()), "not always the nearest"
    part = perturbation(one.config, one.model.quantize, 1100)
    assert part is not None
    assert torch.equal(part(codes[100:150]), found[100:150]), "neither the batch nor the ranks matter"
    assert not torch.equal(part(codes[:50]), found[:50]), "sabotage twin: other positions do"


def test_the_decoder_learns_on_perturbed_codes_and_the_encoder_as_before(shards):
    one = task(shards, {"perturb_share": 0.9, "perturb_tokens": 0.9, "perturb_neighbours": 3})
    exchange = perturbation(one.config, one.model.quantize, 0)
    assert exchange is not None
    images = batch(0).images
    shown, losses, codes = one.model(images, exchange=exchange)
    plain, as_before, same = one.model(images)
    assert torch.equal(codes, same)
    assert torch.equal(losses.commit, as_before.commit)
    assert torch.allclose(shown, one.model.decode(exchange(codes)), atol=1e-5)
    assert not torch.allclose(shown, plain, atol=1e-3)
    (gradient,) = torch.autograd.grad(shown.sum(), one.model.quant_conv.weight)
    assert bool(gradient.any())
    whole, pieces = train(one, 2), train(task(shards, one.config.codebook.model_dump(), train={"micro_batch": 1}), 2)
    other = train(task(shards, {}), 2)
    assert float(whole[0]["reconstruction"]) == pytest.approx(float(pieces[0]["reconstruction"]), rel=1e-5)
    assert float(whole[0]["reconstruction"]) != pytest.approx(float(other[0]["reconstruction"]), rel=1e-3)


def test_more_neighbours_than_codes_are_refused(shards):
    with pytest.raises(UserError, match=r"codebook.perturb_neighbours: no code of 32 has 32 others"):
        settings(shards, {"perturb_share": 0.1, "perturb_neighbours": 32})
