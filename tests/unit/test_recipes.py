"""Recipes against a tuned baseline: compute-to-loss of known curves, bands over seeds, the search, the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.config import load
from llamagen_dist.errors import UserError
from llamagen_dist.launch.points import combinations
from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.models.gpt import GPTConfig
from llamagen_dist.scaling.recipe_runs import flops_per_image
from llamagen_dist.scaling.recipes import Trial, band, best_so_far, called, compare, compute_to
from tests.unit.report_pages import html, inside, section, series, table, text_of
from tests.unit.scaling_points import write_token_manifest

CONFIGS = Path(__file__).parents[2] / "configs"
FLOPS = np.geomspace(1e10, 1e12, 9)
OFF = (("model.qk_norm", False), ("optim.kind", "adamw"))
MUON = (("model.qk_norm", False), ("optim.kind", "muon"))
BOTH = (("model.qk_norm", True), ("optim.kind", "muon"))


def falling(flops: np.ndarray, factor: float = 1.0, seed: int = 0) -> np.ndarray:
    """A loss that is linear in log FLOPs; a recipe of ``factor`` needs that share of the compute for any loss."""
    return 8 - np.log10(flops / factor) / 2 + 0.01 * seed


def trial(switches: Any = OFF, lr: float = 4e-3, seed: int = 0, factor: float = 1.0, **more: Any) -> Trial:
    worse = 1 + abs(np.log2(lr / 4e-3))  # 4e-3 is the best rate
    loss = falling(FLOPS, factor * worse, seed)
    name = f"{called(switches, OFF)} {lr:g} {seed}"
    return replace(Trial(name, "toys", switches, (("optim.lr", lr),), seed, FLOPS, loss), **more)


def trials(*, seeds: tuple[int, ...] = (0, 1, 2), **more: Any) -> list[Trial]:
    own = [trial(OFF, lr, seed) for lr in (2e-3, 4e-3, 8e-3) for seed in (0, 1, 2)]
    return own + [trial(MUON, lr, seed, 0.5, **more) for lr in (2e-3, 4e-3, 8e-3) for seed in seeds]


def row(result: dict[str, Any], recipe: str) -> dict[str, Any]:
    return next(one for one in result["tasks"][0]["rows"] if one["recipe"] == recipe)


# --- one curve ---


def test_compute_to_a_loss_is_exact_on_a_line_in_log_flops_and_moves_with_it():
    for target in (2.2, 2.35, 2.71, float(falling(FLOPS)[3])):
        expected = 10 ** (2 * (8 - target))
        assert compute_to(FLOPS, falling(FLOPS), target) == pytest.approx(expected)
        assert compute_to(FLOPS, falling(FLOPS, 0.8), target) == pytest.approx(0.8 * expected), (
            "a curve that is shifted"
        )
    assert compute_to(FLOPS, falling(FLOPS), 1.99) is None, "never extrapolated"
    assert compute_to(FLOPS, falling(FLOPS), 9.0) == FLOPS[0], "an upper bound"


def test_a_curve_that_rises_again_counts_as_the_best_so_far():
    one = trial(loss=np.array([3.0, 2.5, 2.7, 2.4, 2.9, 2.9, 2.3, 2.6, 2.6]))
    flops, loss = best_so_far([one])
    assert loss.tolist() == [3.0, 2.5, 2.5, 2.4, 2.4, 2.4, 2.3, 2.3, 2.3]
    shorter = trial(flops=FLOPS[[2]], loss=np.array([2.2]))  # with a cooldown of its own, it ends lower
    flops, loss = best_so_far([one, shorter])
    assert flops.tolist() == FLOPS.tolist()
    assert loss[2:].tolist() == [2.2] * 7
    assert band([2.0, 4.0, 3.0]) == {"mean": 3.0, "low": 2.0, "high": 4.0, "seeds": 3}


# --- the table ---


def test_the_best_setting_is_chosen_and_compared_seed_by_seed():
    result = compare(trials(), OFF)
    muon, own = row(result, "muon"), row(result, "baseline")
    assert own["settings"] == muon["settings"] == {"optim.lr": 4e-3}
    assert own["to_loss"]["shares"] == {seed: pytest.approx(1) for seed in "012"}
    assert muon["to_loss"]["shares"] == {seed: pytest.approx(0.5) for seed in "012"}
    assert (muon["to_loss"]["reached"], muon["searched"], muon["seeds"]) == (3, 3, [0, 1, 2])
    assert muon["gain"]["low"] == pytest.approx(np.log10(2) / 2), "of the same seed: their scatter cancels"
    assert own["loss"]["high"] - own["loss"]["low"] == pytest.approx(0.02)
    assert result["warnings"] == []
    chosen = [one["settings"]["optim.lr"] for one in result["tasks"][0]["search"] if one["chosen"]]
    assert (chosen, len(result["tasks"][0]["search"])) == ([4e-3, 4e-3], 6)
    assert own["curve"]["flops"] == FLOPS.tolist()


@pytest.mark.parametrize("share", [0.25, 0.9, 1.5])
def test_a_curve_shifted_in_compute_is_a_share_shifted_as_much(share):
    shifted = [*(t for t in trials() if t.switches == OFF), *(trial(MUON, 4e-3, seed, share) for seed in (0, 1, 2))]
    known = row(compare(shifted, OFF), "muon")["to_loss"]
    if share > 1:
        assert known == {"shares": {"0": None, "1": None, "2": None}, "reached": 0}
    else:
        assert known["mean"] == pytest.approx(share)


def test_shorter_runs_with_a_cooldown_of_their_own_count():
    """As under a WSD schedule: before its cooldown a long run's loss is far above that of a run which ends there."""
    flat = [trial(MUON, 4e-3, s, 0.5, loss=np.append(np.full(8, 4.0), falling(FLOPS, 0.5, s)[-1])) for s in (0, 1, 2)]
    short = [
        replace(t, name="short", flops=FLOPS[:8], loss=np.append(np.full(7, 4.0), falling(FLOPS, 0.5, t.seed)[7]))
        for t in flat
    ]
    own = [t for t in trials() if t.switches == OFF]
    assert row(compare([*own, *flat], OFF), "muon")["to_loss"]["mean"] > 0.9
    result = compare([*own, *flat, *short], OFF)
    assert 0.5 < row(result, "muon")["to_loss"]["mean"] < FLOPS[7] / FLOPS[8], "at its end at the latest"
    assert row(result, "muon")["flops"] == FLOPS[-1], "its loss at the end is that of the longest"


def test_a_seed_that_was_left_out_is_named_and_never_compared():
    complete, lacking = compare(trials(), OFF), compare(trials(seeds=(0, 2)), OFF)
    assert row(lacking, "muon")["seeds"] == [0, 2]
    assert list(row(lacking, "muon")["to_loss"]["shares"]) == ["0", "2"]
    assert lacking["warnings"] == ["toys, muon: no finished run of seed 1"]
    assert row(lacking, "muon") != row(complete, "muon"), "the twin"


def test_a_setting_with_fewer_seeds_is_not_chosen_but_named_where_it_is_better():
    runs = [t for t in trials() if not (t.switches == OFF and t.seed == 2 and t.tuned == (("optim.lr", 4e-3),))]
    result = compare(runs, OFF)
    assert row(result, "baseline")["settings"] != {"optim.lr": 4e-3}
    assert any("optim.lr 0.004 is better on the seeds that it has" in text for text in result["warnings"])


def test_what_makes_a_comparison_unfair_is_said():
    tuned_less = [t for t in trials() if t.switches != OFF or t.tuned == (("optim.lr", 4e-3),)]
    assert "may only lack tuning" in compare(tuned_less, OFF)["warnings"][0]
    edge = [t for t in trials() if t.tuned != (("optim.lr", 8e-3),)]
    assert [w for w in compare(edge, OFF)["warnings"] if "highest optim.lr of those tried (0.004) is best" in w]
    longer = [replace(t, flops=2 * t.flops) if t.switches == MUON else t for t in trials()]
    assert [w for w in compare(longer, OFF)["warnings"] if "2.00 times the baseline's compute" in w]
    with pytest.raises(UserError, match=r"no finished run of the baseline \(model\.qk_norm=False, optim\.kind=adamw\)"):
        compare([t for t in trials() if t.switches != OFF], OFF)
    with pytest.raises(UserError, match="are the same recipe, settings and seed"):
        compare([*trials(), trial(MUON)], OFF)


def test_fid_and_the_compute_to_a_level_of_it():
    points = tuple((float(x), 50 - 10 * i) for i, x in enumerate(FLOPS[::4]))  # 50, 40, 30
    runs = [replace(t, fid=points if t.switches == OFF else tuple((x, y - 5) for x, y in points)) for t in trials()]
    runs = [
        replace(t, images_per_flop=1e-9, fid=t.fid[:2] if (t.switches, t.seed) == (MUON, 1) else t.fid) for t in runs
    ]
    result = compare(runs, OFF, levels=(40.0, 26.0))
    muon = row(result, "muon")
    assert muon["fid"] == {"mean": pytest.approx((25 + 35 + 25) / 3), "low": 25, "high": 35, "seeds": 3}
    assert [one["reached"] for one in muon["ep_fid"]] == [3, 2]
    assert muon["ep_fid"][0]["flops"]["mean"] == FLOPS[4]
    assert muon["ep_fid"][0]["images"]["mean"] == pytest.approx(FLOPS[4] * 1e-9)
    assert [one["reached"] for one in row(result, "baseline")["ep_fid"]] == [3, 0]
    assert called(BOTH, OFF) == "qk_norm + muon"


# --- from folders to a page ---

RATES = (2e-3, 4e-3, 8e-3)


def write_runs(folder: Path) -> Path:
    """A sweep's folder: dropout as a switch, three rates, three seeds, one size; the switch halves the compute."""
    tokens = folder / "fashion" / "tokens"
    write_token_manifest(tokens)
    model = GPTConfig(n_layer=1, n_head=2, dim=24, vocab_size=512, image_tokens=64, num_classes=2, multiple_of=8)
    for dropout, factor in ((0.1, 1.0), (0.0, 0.5)):
        for lr in RATES:
            for seed in (0, 1, 2):
                run = folder / "sweep" / f"d{dropout}-lr{lr}-s{seed}"
                run.mkdir(parents=True)
                (run / "config.yaml").write_text(
                    f"kind: gpt\nrun_dir: {run}\ndata: {{train: {tokens}, validation: {tokens}}}\n"
                    f"model: {{n_layer: 1, n_head: 2, dim: 24, multiple_of: 8, token_dropout_p: {dropout}}}\n"
                    f"train: {{images: 12288, global_batch: 64, seed: {seed}}}\noptim: {{lr: {lr}}}\n"
                )
                (run / "summary.json").write_text(json.dumps({"name": run.name, "params": total_parameters(model)}))
                images = np.array([768, 1536, 3072, 6144, 12288])
                loss = falling(images * 1e5, factor * (1 + abs(np.log2(lr / 4e-3))), seed)
                lines = [
                    {"step": 1, "images_seen": int(i), "val_loss": one} for i, one in zip(images, loss, strict=True)
                ]
                (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "sweep"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("recipes"))


def test_a_sweeps_runs_become_the_table_and_its_page(sweep, tmp_path, capsys):
    (sweep / "d0.0-lr0.002-s0" / "summary.json").rename(tmp_path / "kept.json")  # one that has not finished
    main(["scaling", "recipes", str(sweep), "--out", str(tmp_path / "recipes.json")])
    (tmp_path / "kept.json").rename(sweep / "d0.0-lr0.002-s0" / "summary.json")
    said = capsys.readouterr().out
    assert "d0.0-lr0.002-s0: not finished (12,288 images)" in said
    assert "token_dropout_p 0: loss 3.3147 (3.3047 to 3.3247), baseline's loss at 0.50" in said
    result = json.loads((tmp_path / "recipes.json").read_text())
    assert (result["switches"], result["tuned"]) == (["model.token_dropout_p"], ["optim.lr"])
    assert result["baseline"] == {"model.token_dropout_p": 0.1}, "this version's default is what is off"
    own, other = result["tasks"][0]["rows"]
    assert other["to_loss"]["mean"] == pytest.approx(0.5)
    model = GPTConfig(n_layer=1, n_head=2, dim=24, vocab_size=512, image_tokens=64, num_classes=2, multiple_of=8)
    assert own["flops"] == 12288 * training_flops_per_image(model)
    page = section(tmp_path / "recipes.json", "Recipes against the tuned baseline")
    rows = table(page)
    assert rows[1][0] == "baseline"
    assert rows[2][:4] == [
        other["recipe"],
        "3.3147 (3.3047 to 3.3247)",
        "+0.1505 (+0.1505 to +0.1505)",
        "0.50 (0.50 to 0.50)",
    ]
    assert len(table(page, 1)) == 1 + 6, "the whole search"
    assert table(page, 2)[1] == [other["recipe"], "in 1 of 1 tasks", "0.50 to 0.50"]
    assert "below the baseline's by 0.1505" in text_of(page)
    (figure,) = inside(page, "figure")
    assert series(figure)[other["recipe"]]["y"] == pytest.approx(other["curve"]["mean"])
    assert series(figure)["baseline, range over seeds"]["to"] == pytest.approx(own["curve"]["high"])
    assert "Recipes against the tuned baseline" in html(tmp_path / "recipes.json")


def test_the_page_follows_what_was_measured(sweep, tmp_path):
    """Sabotage twin: with other results the same page says something else."""
    file = tmp_path / "recipes.json"
    main(["scaling", "recipes", str(sweep), "--out", str(file)])
    result = json.loads(file.read_text())
    other = result["tasks"][0]["rows"][1]
    other["gain"] |= {"low": -0.01}
    other["to_loss"] = {"shares": {"0": 0.5, "1": None, "2": 0.7}, "reached": 2, **band([0.5, 0.7])}
    file.write_text(json.dumps(result))
    page = section(file, "Recipes against the tuned baseline")
    assert "keep the **baseline**: no recipe is better in every seed" in text_of(page)
    assert table(page)[2][3] == "0.60 (0.50 to 0.70), 2 of 3 seeds; else not reached"
    assert table(page, 2)[1][1:] == ["in 0 of 1 tasks", "0.50 to 0.70, 1 of 3 not reached"]
    other["gain"] |= {"low": 0.01}
    other["flops"] *= 1.5
    other["to_loss"] = {"shares": {"0": 1.1, "1": 1.2, "2": 1.0}, "reached": 3, **band([1.1, 1.2, 1.0])}
    file.write_text(json.dumps(result))
    text = text_of(section(file, "Recipes against the tuned baseline"))
    assert "in each of 3 seeds, with 1.50 times its compute" in text
    assert "none of them needs less compute" in text
    other["to_loss"] = {"shares": {"0": None, "1": None, "2": None}, "reached": 0}
    file.write_text(json.dumps(result))
    assert table(section(file, "Recipes against the tuned baseline"))[2][3] == "not reached"


def test_muons_products_are_counted():
    model = GPTConfig(n_layer=2, n_head=2, dim=24, vocab_size=512, image_tokens=64, num_classes=2, multiple_of=8)
    config = load(CONFIGS / "gpt/quickstart.yaml", ["optim.kind=muon", "train.images=640", "train.global_batch=64"])
    plain = load(CONFIGS / "gpt/quickstart.yaml", ["train.images=640", "train.global_batch=64"])
    assert flops_per_image(plain, model) == training_flops_per_image(model)
    square, wide = 6 * 24**3, 4 * 24**2 * model.ffn_dim + 2 * 24**3  # of one Newton-Schulz step
    more = 2 * 5 * (4 * square + 3 * wide) / 64
    assert flops_per_image(config, model) == training_flops_per_image(model) + more


def test_the_shipped_sweep_has_a_baseline_that_is_searched_as_long_as_any_recipe():
    points = [dict(row.settings) for row in combinations(load(CONFIGS / "sweep/recipes.yaml"), "recipes.yaml")]
    off = {"optim.kind": "adamw", "model.qk_norm": False, "model.z_loss": 0.0, "model.order": "raster"}
    off |= {"model.guidance": "dropout"}
    families: dict[tuple[Any, ...], set[str]] = {}
    for point in points:
        family = tuple(point.get(key, value) for key, value in off.items())
        kept = {k: v for k, v in point.items() if k.startswith("optim.") and "cool" not in k and "images" not in k}
        families.setdefault(family, set()).add(json.dumps(kept, sort_keys=True))
    assert len(families[tuple(off.values())]) == max(map(len, families.values())) == 8
    assert {point["train.seed"] for point in points} == {0, 1, 2}
    assert len({point["model.dim"] for point in points}) == 2


def test_a_run_without_a_held_out_loss_is_refused(sweep, tmp_path):
    metrics = sweep / "d0.0-lr0.002-s0" / "metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text("")
    with pytest.raises(
        UserError, match=r"d0\.0-lr0\.002-s0: has no held-out loss; train it with validation\.at_images"
    ):
        main(["scaling", "recipes", str(sweep)])
    metrics.write_text(before.replace("}", ', "val_loss": NaN}', 1))
    with pytest.raises(UserError, match="held-out loss after 768 images is not a number"):
        main(["scaling", "recipes", str(sweep)])
    metrics.write_text(before)
