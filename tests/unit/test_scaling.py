"""Scaling laws: the fit is at the optimum, whatever the data; what it predicts it knows the limits of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.cli import main
from llamagen_dist.config import UserError
from llamagen_dist.models.cost import total_parameters, training_flops_per_image
from llamagen_dist.models.gpt import GPTConfig
from llamagen_dist.models.sizes import GPT_SIZES
from llamagen_dist.scaling import solve
from llamagen_dist.scaling.bootstrap import bootstrap
from llamagen_dist.scaling.fit import fit_law
from llamagen_dist.scaling.frontier import closed_form, non_embedding, over_shapes
from llamagen_dist.scaling.ladder import read_ladder
from llamagen_dist.scaling.laws import LAWS, evaluate, weighted_hessian
from llamagen_dist.scaling.points import Points, parse_csv
from llamagen_dist.scaling.study import Options, study

SIZES = np.array([111e6, 343e6, 775e6, 1.4e9, 3.1e9])
BUDGETS = np.array([2e9, 5e9, 1e10, 2e10, 5e10, 1e11])
NAMES = ("A", "B", "E", "alpha", "beta")
TRUTHS = [
    (406.4, 410.7, 1.69, 0.34, 0.28),
    (60, 300, 6.5, 0.30, 0.35),
    (1e4, 1e6, 3, 0.55, 0.65),
    (8, 10, 5, 0.12, 0.14),
]


def chinchilla(n: np.ndarray, d: np.ndarray, truth: tuple[float, ...] = TRUTHS[0]) -> np.ndarray:
    a, b, e, alpha, beta = truth
    return e + a / n**alpha + b / d**beta


def grid(sizes: np.ndarray = SIZES, budgets: np.ndarray = BUDGETS) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(sizes, budgets, indexing="ij")
    return n.ravel(), d.ravel()


def points(n: np.ndarray, d: np.ndarray, loss: np.ndarray, runs: tuple[str, ...] | None = None) -> Points:
    return Points(n, d, loss, runs or tuple(f"r{i}" for i in range(len(n))))


def noisy(seed: int, sigma: float, truth: tuple[float, ...] = TRUTHS[0]) -> Points:
    n, d = grid()
    return points(n, d, chinchilla(n, d, truth) * np.exp(sigma * np.random.default_rng(seed).standard_normal(len(n))))


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_known_parameters_come_back(truth: tuple[float, ...], loss: str) -> None:
    n, d = grid()
    fit = fit_law(points(n, d, chinchilla(n, d, truth)), "chinchilla", loss)  # type: ignore[arg-type]
    assert [fit.parameters[name] for name in NAMES] == pytest.approx(truth, rel=1e-8)
    assert fit.predict(7e9, 3e11) == pytest.approx(chinchilla(7e9, 3e11, truth), rel=1e-9)  # type: ignore[arg-type]


def test_swapped_params_and_tokens_are_another_law() -> None:
    """Sabotage: N and D exchanged; the parameters come out exchanged, and the prediction is wrong."""
    n, d = grid()
    fit = fit_law(points(d, n, chinchilla(n, d)))
    assert [fit.parameters[name] for name in ("B", "A", "E", "beta", "alpha")] == pytest.approx(TRUTHS[0], rel=1e-6)
    assert abs(fit.predict(7e9, 3e11) / chinchilla(np.array(7e9), np.array(3e11)) - 1) > 0.01


def test_a_published_image_law_and_what_a_pure_power_misses() -> None:
    """Henighan et al. 2020, 16 x 16 VQ tokens: L(N) = 3.99 + (N / 2.7e4)^-0.13; the floor cannot be left out."""
    n = np.geomspace(1e5, 1e9, 8)
    loss = 3.99 + (n / 2.7e4) ** -0.13
    fit = fit_law(points(n[:6], n[:6], loss[:6]), "power_irr")
    assert (fit.parameters["E"], fit.parameters["alpha"]) == pytest.approx((3.99, 0.13), rel=1e-6)
    assert fit.predict(n[7], 1.0) == pytest.approx(loss[7], rel=1e-6)
    slope, level = np.polyfit(np.log(n[:6]), np.log(loss[:6]), 1)  # twin: without the floor
    assert np.exp(level + slope * np.log(n[7])) / loss[7] - 1 == pytest.approx(-0.0227, abs=5e-4)


def test_published_parameters_give_the_published_tokens_per_parameter() -> None:
    """Besiroglu et al. 2024: D/N at 5.76e23 FLOPs from their parameters is 18.34; Hoffmann's own give about 70."""
    n, d = grid()
    found = {}
    for name, truth in (
        ("besiroglu", (482.00572, 2085.4342, 1.81686, 0.34781, 0.36585)),
        ("hoffmann", TRUTHS[0]),
    ):
        best = closed_form(fit_law(points(n, d, chinchilla(n, d, truth))), [5.76e23])[0]
        found[name] = best.tokens / best.params
        sizes = np.geomspace(best.params / 3, best.params * 3, 2001)
        losses = chinchilla(sizes, 5.76e23 / (6 * sizes), truth)
        assert sizes[losses.argmin()] == pytest.approx(best.params, rel=2e-3)
        assert best.flops == pytest.approx(6 * best.params * best.tokens, rel=1e-12)
    assert found["besiroglu"] == pytest.approx(18.34, abs=0.02)
    assert 60 < found["hoffmann"] < 110


@pytest.mark.parametrize("form", LAWS)
def test_gradient_and_hessian_are_those_of_the_log_loss(form: str) -> None:
    law = LAWS[form]
    rng = np.random.default_rng(1)
    logs, weights = rng.normal(size=(7, len(law.terms))), rng.normal(size=(1, 7))
    theta = np.concatenate([rng.uniform(0.2, 1, len(law.coefficients)), rng.uniform(0.2, 0.8, len(law.exponents))])[
        None
    ]
    _, gradient = evaluate(law, logs, theta)
    hessian = weighted_hessian(law, logs, theta, weights)
    for i in range(law.k):
        step = np.zeros((1, law.k))
        step[0, i] = 1e-6
        above, below = evaluate(law, logs, theta + step), evaluate(law, logs, theta - step)
        assert gradient[0, :, i] == pytest.approx((above[0] - below[0])[0] / 2e-6, rel=1e-6, abs=1e-9)
        column = np.einsum("rn,rnk->k", weights, above[1] - below[1]) / 2e-6
        assert hessian[0, i] == pytest.approx(column, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("delta", [1e-3, 1e-2, np.inf])
def test_the_objectives_derivatives(delta: float) -> None:
    n, d = grid()
    logs = np.log(np.stack([n, d], axis=1))
    target = np.log(noisy(3, 0.01).loss)[None]
    problem = solve.Problem(LAWS["chinchilla"], logs - logs.mean(0), target - target.mean(), np.ones((1, len(n))))
    theta = np.array([[0.6, 0.2, 0.2, 0.3, 0.4]])
    value, gradient, hessian, _ = solve.derivatives(problem, theta, delta)
    assert value == pytest.approx(solve.objective(problem, theta, delta))
    for i in range(5):
        step = np.zeros((1, 5))
        step[0, i] = 1e-7
        above, below = (solve.derivatives(problem, theta + s, delta) for s in (step, -step))
        assert gradient[0, i] == pytest.approx((above[0] - below[0])[0] / 2e-7, rel=1e-5)
        assert hessian[0, i] == pytest.approx((above[1] - below[1])[0] / 2e-7, rel=1e-4, abs=1e-5)


def random_search(problem: solve.Problem, delta: float, seed: int) -> float:
    """The best of many random starts of a derivative-free descent (shrinking Gaussian steps), all at once."""
    rng = np.random.default_rng(seed)
    low, high = problem.bounds()
    high = np.where(np.isinf(high), 1.5, 1.2)
    theta = rng.uniform(np.maximum(low, 0.02), high, (200, len(low)))
    value = solve.objective(problem, theta, delta)
    for step in np.geomspace(0.3, 1e-5, 400):
        trial = np.maximum(theta * np.exp(step * rng.standard_normal(theta.shape)), low)
        there = solve.objective(problem, trial, delta)
        better = there < value
        theta[better], value[better] = trial[better], there[better]
    return float(value.min())


@pytest.mark.parametrize("seed", range(4))
def test_no_random_search_finds_a_lower_objective(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d = grid(np.geomspace(1e4, 1e6, 4), np.geomspace(1e5, 1e6, 3))
    truth = (10 ** rng.uniform(0, 2), 10 ** rng.uniform(0, 3), rng.uniform(0, 4), *rng.uniform(0.1, 0.6, 2))
    given = points(n, d, chinchilla(n, d, truth) * np.exp(10 ** rng.uniform(-3, -1) * rng.standard_normal(len(n))))
    for form in ("chinchilla", "chinchilla_tied"):
        fit = fit_law(given, form, delta=1e-3)
        assert fit.stationarity < 1e-5
        assert fit.objective <= random_search(fit.problem(), 1e-3, seed) * (1 + 1e-9)


def test_a_point_beside_the_optimum_is_not_called_stationary() -> None:
    fit = fit_law(noisy(0, 0.003))
    beside = fit.theta * np.array([1.001, 1, 1, 1, 1])
    assert solve.stationarity(fit.problem(), fit.theta[None], fit.delta)[0] < 1e-5
    assert solve.stationarity(fit.problem(), beside[None], fit.delta)[0] > 1e-2


def test_a_huber_fit_of_the_loss_instead_of_its_log_would_differ() -> None:
    """One outlier of 30 %: the log-Huber fit stays, the squared one moves, and both say what they minimised."""
    good = noisy(5, 0.001)
    bad = Points(good.params, good.tokens, good.loss * np.where(np.arange(30) == 4, 1.3, 1), good.runs)
    reference = chinchilla(np.array(7e9), np.array(3e11))
    robust, squares = fit_law(bad), fit_law(bad, loss="l2")
    assert abs(robust.predict(7e9, 3e11) / reference - 1) < 0.005
    assert abs(squares.predict(7e9, 3e11) / reference - 1) > 0.01
    r = robust.residuals
    by_hand = np.where(np.abs(r) <= 1e-3, r**2 / 2, 1e-3 * (np.abs(r) - 5e-4)).sum()
    assert robust.objective == pytest.approx(by_hand, rel=1e-12)
    assert r == pytest.approx(np.log(bad.loss) - np.log(robust.predict(bad.params, bad.tokens)), abs=1e-12)


def test_units_do_not_matter() -> None:
    given = noisy(7, 0.004)
    fit = fit_law(given)
    scaled = fit_law(points(given.params * 1e-6, given.tokens * 256, given.loss / np.log(2)))
    assert scaled.objective == pytest.approx(fit.objective, rel=1e-9)
    for name in ("alpha", "beta"):
        assert scaled.parameters[name] == pytest.approx(fit.parameters[name], rel=1e-6)
    assert scaled.parameters["E"] == pytest.approx(fit.parameters["E"] / np.log(2), rel=1e-6)
    assert scaled.predict(7e3, 256 * 3e11) == pytest.approx(fit.predict(7e9, 3e11) / np.log(2), rel=1e-7)


def test_what_cannot_be_fitted_is_refused_with_a_reason() -> None:
    n, d = grid()
    loss = chinchilla(n, d)
    for wrong, form, message in (
        (points(n[:5], d[:5], loss[:5]), "chinchilla", "5 points are too few for chinchilla, which has 5 parameters"),
        (points(n * 0 + 1e6, d, loss), "chinchilla", "same params, so A and alpha.*fit power_irr_tokens instead"),
        (points(n, d * 0 + 1e6, loss), "chinchilla", "same tokens, so B and beta.*fit power_irr instead"),
        (points(n, 20 * n, chinchilla(n, 20 * n)), "chinchilla", "lockstep"),
        (points(n, d, loss * 0 + 2), "chinchilla", "loss is the same at every point"),
        (points(n, d, loss), "kaplan", "form 'kaplan' is unknown; there are chinchilla"),
    ):
        with pytest.raises(UserError, match=message):
            fit_law(wrong, form)
    with pytest.raises(UserError, match=r"point 3 \(run r2\): loss is nan"):
        points(n, d, np.where(np.arange(30) == 2, np.nan, loss))


def test_no_interval_below_k_plus_3_points() -> None:
    """LlamaGen's published FIDs at four sizes, fitted with a floor, foretell the fifth, but without an interval."""
    n = np.array([110_888_448, 342_910_976, 774_699_520, 1_410_972_672], float)
    fit = fit_law(points(n, n, np.array([6.09, 3.07, 2.62, 2.34])), "power_irr", "l2")
    assert fit.predict(3_096_659_200.0, 1.0) == pytest.approx(2.296, abs=0.01)  # measured: 2.18
    with pytest.raises(UserError, match=r"4 points are too few for a confidence interval.*at least 6"):
        bootstrap(fit)


def test_runs_are_drawn_whole_where_there_are_enough() -> None:
    given = noisy(2, 0.003)
    many = bootstrap(fit_law(given), 50)
    assert many.method.startswith("cluster bootstrap: 50 draws of 30 whole runs")
    few = Points(given.params, given.tokens, given.loss, tuple(f"n{n:.0f}" for n in given.params))
    assert (
        "residual bootstrap: 50 draws of the 30 log residuals (5 runs are too few" in bootstrap(fit_law(few), 50).method
    )
    again = bootstrap(fit_law(given), 50)
    assert (many.theta == again.theta).all()
    assert many.stationary > 0.9


def test_the_band_covers_new_measurements_as_often_as_it_says() -> None:
    inside, narrow = 0, 0
    for trial in range(40):
        given = noisy(100 + trial, 0.01)
        fit = fit_law(given, delta=1e-2)
        made = bootstrap(fit, 80)
        measured = chinchilla(np.array([7e9]), np.array([3e11])) * np.exp(
            0.01 * np.random.default_rng(trial).standard_normal(1)
        )
        low, high = made.band(fit, np.array([7e9]), np.array([3e11]))
        inside += int(low[0] <= measured[0] <= high[0])
        middle, half = (low + high) / 2, (high - low) / 20  # twin: a band a tenth as wide
        narrow += int(abs(measured[0] - middle[0]) <= half[0])
    assert inside >= 33  # nominal 38; fewer than 33 of 40 has probability 1e-3
    assert narrow < 20


def write_ladder(folder: Path, losses: dict[tuple[str, int], float] | None = None) -> Path:
    """Five finished runs with losses from a known law of the blocks' parameters and the tokens (0.4 % scatter)."""
    tokens = folder / "tokens"
    tokens.mkdir(parents=True)
    (tokens / "manifest.json").write_text(
        json.dumps(
            {"format": 1, "kind": "tokens", "count": 0, "members": ["codes.npy"], "shards": [], "vocab_size": 512,
             "grid": [8, 8], "classes": ["a", "b"], "crops": 1}
        )
    )  # fmt: skip
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
    assert "residual bootstrap" in one["band"]
    assert "e after 786,432 tokens: predicted" in capsys.readouterr().out
    flops = [best["flops"] for best in found["frontier"]]
    assert flops == sorted(flops)
    assert flops[-1] == pytest.approx(10 * 12288 * training_flops_per_image(shape(6, 112)))
    assert [best["loss"] for best in found["frontier"]] == sorted((b["loss"] for b in found["frontier"]), reverse=True)
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


CSV = "params,tokens,loss,run\n1e6,2e7,3.5,a\n2e6,2e7,3.25,b\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "runs.csv: empty; it needs a header"),
        (CSV.replace("loss", "val_loss"), "the column loss is missing"),
        (CSV.replace("run\n", "loss\n"), "the column loss is there twice"),
        (CSV.replace("3.25", "n/a"), "runs.csv, line 3: loss is 'n/a', not a number"),
        (CSV.replace("3.25", "-1"), "runs.csv, line 3: loss is -1, and"),
        (CSV.replace("3.5", "inf"), "runs.csv, line 2: loss is inf, and"),
        (CSV.replace("1e6", "0"), "runs.csv, line 2: params is 0, and"),
        (CSV.replace(",a", ""), "runs.csv, line 2: 3 cells under a header of 4"),
        (CSV, "2 points are too few for chinchilla"),
    ],
)
def test_bad_files_get_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        main(["scaling", "fit", str(path), "--out", str(tmp_path / "fit.json")])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "fit.json").exists()


def test_hold_out_names_a_run_of_a_csv(tmp_path: Path) -> None:
    n, d = grid()
    loss = chinchilla(n, d)
    rows = [f"{a:.17g},{b:.17g},{c:.17g},s{a:.0f}" for a, b, c in zip(n, d, loss, strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(["params,tokens,loss,run", *rows]))
    command = ["scaling", "fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "fit.json"), "--hold-out"]
    main([*command, "largest"])
    one = json.loads((tmp_path / "fit.json").read_text())["prediction"]
    assert (one["name"], one["tokens"]) == ("s3100000000", 1e11)
    assert one["predicted"] == pytest.approx(one["measured"], rel=1e-9)
    with pytest.raises(UserError, match="no such run; there are s111000000"):
        main([*command, "s1"])


positive = st.floats(1e-300, 1e300)
name = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).map(lambda text: text.replace('"', "'"))


@given(st.lists(st.tuples(positive, positive, positive, name), min_size=1, max_size=20), st.permutations(range(4)))
def test_a_csv_is_read_back_exactly(rows: list[tuple[float, float, float, str]], order: list[int]) -> None:
    header = ["params", "tokens", "loss", "run"]
    lines = [",".join(header[i] for i in order)]
    lines += [",".join(f'"{row[3]}"' if i == 3 else repr(row[i]) for i in order) for row in rows]
    found = parse_csv("\r\n".join(lines), "x")
    assert list(zip(found.params, found.tokens, found.loss, found.runs, strict=True)) == rows


@settings(max_examples=200)
@given(
    st.text() | st.text("params,tokens,loss\n\r1e9.-\"'", max_size=60).map(lambda text: "params,tokens,loss\n" + text)
)
def test_any_text_is_points_or_one_sentence(text: str) -> None:
    try:
        found = parse_csv(text, "x")
    except UserError as error:
        message = str(error)
    else:
        assert ((found.params > 0) & np.isfinite(found.loss)).all()
        message = "x"
    assert message.startswith("x")
