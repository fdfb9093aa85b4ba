"""A folder of runs as points of a law, its prediction of the largest, and exact costs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.models.gpt import GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES
from llamagen_dist.scaling.fit import fit_law
from llamagen_dist.scaling.frontier import non_embedding, over_shapes
from llamagen_dist.scaling.ladder import Ladder, of_runs, runs_in
from llamagen_dist.scaling.points import AS_NAMED
from llamagen_dist.scaling.study import Options, study
from tests.unit.scaling_points import chinchilla, grid, points, write_token_manifest


def write_ladder(folder: Path, losses: dict[tuple[str, int], float] | None = None) -> Path:
    """Five finished runs with losses from a known law of the blocks' parameters and the tokens (0.4 % scatter)."""
    tokens = folder / "tokens"
    write_token_manifest(tokens)
    rng = np.random.default_rng(0)
    for name, layers, dim in (("a", 1, 24), ("b", 2, 32), ("c", 3, 48), ("d", 4, 64), ("e", 6, 112)):
        run = folder / "ladder" / name
        run.mkdir(parents=True)
        model = shape(layers, dim)
        (run / "config.yaml").write_text(
            f"kind: gpt\nrun_dir: {run}\nmodel: {{n_layer: {layers}, n_head: 2, dim: {dim}, multiple_of: 8}}\n"
            f"data: {{train: {tokens}, validation: {tokens}}}\ntrain: {{images: 12288, global_batch: 64}}\n"
        )
        (run / "summary.json").write_text(json.dumps({"name": name, "params": total_parameters(model)}))
        lines = []
        for images in (3072, 6144, 12288):
            law = chinchilla(np.array(float(non_embedding(model))), np.array(images * 64.0), (9.0, 60.0, 2.0, 0.3, 0.3))
            loss = (losses or {}).get((name, images), float(law) * float(np.exp(0.004 * rng.standard_normal())))
            lines.append(json.dumps({"step": images // 64, "images_seen": images, "val_loss": loss}))
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "ladder"


def read_ladder(folder: Path) -> Ladder:
    """The finished runs of a folder."""
    runs, dropped = runs_in([folder])
    return of_runs(runs, "blocks", AS_NAMED, dropped)


def shape(layers: int, dim: int) -> GPTConfig:
    return GPTConfig(n_layer=layers, n_head=2, dim=dim, vocab_size=512, image_tokens=64, num_classes=2, multiple_of=8)


def test_a_ladder_predicts_its_largest_rung_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "OUT" / "scaling.json"
    folder = write_ladder(tmp_path)
    main(["scaling", "fit", str(folder), "--hold-out", "largest", "--out", str(out)])
    found = json.loads(out.read_text())
    assert [p["name"] for p in found["points"]] == [name for name in "abcde" for _ in range(3)]
    assert [p["held_out"] for p in found["points"]] == [False] * 12 + [True] * 3
    one = found["prediction"]
    assert (one["name"], one["params"], one["tokens"]) == ("e", total_parameters(shape(6, 112)), 12288 * 64)
    assert one["params_fit"] == non_embedding(shape(6, 112)) < one["params"]
    measured = [json.loads(line)["val_loss"] for line in (folder / "e" / "metrics.jsonl").read_text().splitlines()]
    assert [p["measured"] for p in found["predictions"]] == measured
    assert one["naive"] == json.loads((folder / "d" / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    for p in found["predictions"]:
        assert p["ci95"][0] < p["measured"] < p["ci95"][1]
        assert abs(p["predicted"] - p["measured"]) < abs(p["naive"] - p["measured"])
    assert found["definitions"]["params_fit"].startswith("N of the law: the blocks' matrices")
    assert "parametric bootstrap" in one["band"]
    assert "e after 786,432 tokens: predicted" in capsys.readouterr().out
    flops = [best["flops"] for best in found["frontier"]["best"]]
    assert flops == sorted(flops)
    assert flops[-1] == pytest.approx(10 * 12288 * training_flops_per_image(shape(6, 112)))
    losses = [best["loss"] for best in found["frontier"]["best"]]
    assert losses == sorted(losses, reverse=True)
    assert set(found) >= {"form", "loss", "delta", "objective", "params", "ci95", "se", "n", "dropped", "diagnostics"}
    assert set(found["record"]) >= {"versions", "bootstrap", "points_sha256"}
    main(["scaling", "fit", str(folder), "--hold-out", "largest", "--out", str(tmp_path / "again.json")])
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_a_rung_that_breaks_the_law_falls_outside_its_band(tmp_path: Path) -> None:
    """Sabotage: the largest run learnt nothing more than the one before it, five per cent above the law."""
    ladder = read_ladder(write_ladder(tmp_path, {("e", 12288): 4.5}))
    found = study(ladder.points, Options(hold_out="largest"), ladder)
    assert [p["inside"] for p in found["predictions"]] == [True, True, False]


def test_a_decaying_rate_leaves_only_the_end_of_each_run(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path)
    for path in folder.glob("*/config.yaml"):
        path.write_text(path.read_text() + "optim: {schedule: wsd, cooldown_from: 6144, cooldown_images: 6144}\n")
    ladder = read_ladder(folder)
    assert ladder.points.tokens.tolist() == [12288 * 64.0] * 5
    assert "after the cooldown" in study(ladder.points, Options(form="power_irr"), ladder)["definitions"]["loss"]


def test_a_run_that_alone_cools_down_counts_only_while_its_rate_was_constant(tmp_path: Path) -> None:
    """Its end after the cooldown is another recipe; taken as a point, it would pass for a law that failed."""
    folder = write_ladder(tmp_path, {("e", 12288): 2.0})
    config = folder / "e" / "config.yaml"
    before = config.read_text()
    config.write_text(before + "optim: {schedule: wsd, cooldown_from: 6144, cooldown_images: 6144}\n")
    ladder = read_ladder(folder)
    found = study(ladder.points, Options(hold_out="largest"), ladder)
    assert [p["tokens"] for p in found["predictions"]] == [3072 * 64.0, 6144 * 64.0]
    assert all(p["inside"] for p in found["predictions"])
    assert "constant learning rate" in found["definitions"]["loss"]
    config.write_text(before + "optim: {schedule: wsd, cooldown_from: 3000, cooldown_images: 9288}\n")
    with pytest.raises(UserError, match="ladder/e: its rate decays from image 3000 on"):
        read_ladder(folder)


def test_other_token_shards_are_noticed(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path)
    manifest = tmp_path / "tokens" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("512", "1024"))
    with pytest.raises(UserError, match=r"ladder/a: summary.json counts \d+ parameters, but its config"):
        read_ladder(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no finished run in it"):
        read_ladder(folder)


def test_the_frontier_beats_every_measured_shape_at_its_cost() -> None:
    law = (9.0, 60.0, 2.0, 0.3, 0.3)
    n, d = grid(np.geomspace(1e4, 1e6, 5), np.geomspace(1e5, 1e6, 4))
    fit = fit_law(points(n, d, chinchilla(n, d, law)))
    like = shape(4, 64)
    cost = 12288 * training_flops_per_image(like)
    best = over_shapes(fit, like, [cost], total=False)[0]
    assert best.loss <= fit.predict(non_embedding(like), 12288 * 64.0) + 1e-9
    assert best.flops == cost


def test_exact_costs_of_the_released_sizes() -> None:
    """Parameters and training FLOPs per image (256 tokens, causal attention as half) of LlamaGen B, L, XL, XXL, 3B."""
    for name, total, flops in (
        ("GPT-B", 110_888_448, 1.5343e11),
        ("GPT-L", 342_910_976, 5.0899e11),
        ("GPT-XL", 774_699_520, 1.1738e12),
        ("GPT-XXL", 1_410_972_672, 2.1551e12),
        ("GPT-3B", 3_096_659_200, 4.7011e12),
    ):
        config = GPTConfig(**GPT_SIZES[name])
        assert total_parameters(config) == total
        assert training_flops_per_image(config) == pytest.approx(flops, rel=1e-3)
