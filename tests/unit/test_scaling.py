"""Scaling laws: the fit is at the optimum, whatever the data; what it predicts it knows the limits of."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.scaling import solve
from llamagen_dist.scaling.bootstrap import bootstrap
from llamagen_dist.scaling.fit import fit_law
from llamagen_dist.scaling.frontier import closed_form
from llamagen_dist.scaling.laws import LAWS, evaluate, predict
from llamagen_dist.scaling.points import Options, Points, parse_csv
from llamagen_dist.scaling.refusals import NoSignalError, TooFewPointsError, UnidentifiableError
from tests.unit.scaling_points import BUDGETS, NAMES, SIZES, TRUTHS, chinchilla, grid, noisy, points


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("loss", ["huber", "l2", "lad", "pinball"])
def test_known_parameters_come_back(truth: tuple[float, ...], loss: str) -> None:
    n, d = grid()
    fit = fit_law(points(n, d, chinchilla(n, d, truth)), "chinchilla", loss)
    assert [fit.params[name] for name in NAMES] == pytest.approx(truth, rel=1e-8)
    assert fit.predict(7e9, 3e11) == pytest.approx(chinchilla(7e9, 3e11, truth), rel=1e-9)  # type: ignore[arg-type]


def test_swapped_params_and_tokens_are_another_law() -> None:
    """Sabotage: N and D exchanged; the parameters come out exchanged, and the prediction is wrong."""
    n, d = grid()
    fit = fit_law(points(d, n, chinchilla(n, d)))
    assert [fit.params[name] for name in ("B", "A", "E", "beta", "alpha")] == pytest.approx(TRUTHS[0], rel=1e-6)
    assert abs(fit.predict(7e9, 3e11) / chinchilla(np.array(7e9), np.array(3e11)) - 1) > 0.01


def test_a_published_image_law_and_what_a_pure_power_misses() -> None:
    """Henighan et al. 2020, 16 x 16 VQ tokens: L(N) = 3.99 + (N / 2.7e4)^-0.13; the floor cannot be left out."""
    n = np.geomspace(1e5, 1e9, 8)
    loss = 3.99 + (n / 2.7e4) ** -0.13
    fit = fit_law(points(n[:6], n[:6], loss[:6]), "power_irr")
    assert (fit.params["E"], fit.params["alpha"]) == pytest.approx((3.99, 0.13), rel=1e-6)
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
    x, weights = rng.normal(size=(7, len(law.features))), rng.normal(size=(1, 7))
    theta = rng.uniform(0.2, 0.9, (1, law.k))
    local = evaluate(law, x, theta)
    assert local.value == pytest.approx(predict(law, x, theta), rel=1e-14)
    squares = rng.normal(size=(1, 7))
    hessian = local.hessian(weights, squares)
    hessian -= np.einsum("rn,rni,rnj->rij", squares, local.gradient, local.gradient)
    for i in range(law.k):
        step = np.zeros((1, law.k))
        step[0, i] = 1e-6
        above, below = evaluate(law, x, theta + step), evaluate(law, x, theta - step)
        slope = (predict(law, x, theta + step) - predict(law, x, theta - step))[0] / 2e-6
        assert local.gradient[0, :, i] == pytest.approx(slope, rel=1e-6, abs=1e-8)
        column = np.einsum("rn,rnk->k", weights, above.gradient - below.gradient) / 2e-6
        assert hessian[0, i] == pytest.approx(column, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("delta", [1e-3, 1e-2, np.inf])
def test_the_objectives_derivatives(delta: float) -> None:
    n, d = grid()
    x = np.log(np.stack([n, d], axis=1))
    x -= x.mean(axis=0)
    target = np.log(noisy(3, 0.01).loss)[None]
    law = LAWS["chinchilla"]
    problem = solve.Problem(law, x, target - target.mean(), np.ones((1, len(n))), *solve.bounds(law, x), (1.0, 0.3))
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
    low, high = problem.low[0], problem.high[0]
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
        assert scaled.params[name] == pytest.approx(fit.params[name], rel=1e-6)
    assert scaled.params["E"] == pytest.approx(fit.params["E"] / np.log(2), rel=1e-6)
    assert scaled.predict(7e3, 256 * 3e11) == pytest.approx(fit.predict(7e9, 3e11) / np.log(2), rel=1e-7)


def test_what_cannot_be_fitted_is_refused_with_a_reason() -> None:
    n, d = grid()
    loss = chinchilla(n, d)
    for wrong, form, kind, message in (
        (
            points(n[:5], d[:5], loss[:5]),
            "chinchilla",
            TooFewPointsError,
            "5 points are too few for chinchilla, which has 5 parameters",
        ),
        (
            points(n * 0 + 1e6, d, loss),
            "chinchilla",
            UnidentifiableError,
            "same params, so A and alpha.*fit power_irr_tokens instead",
        ),
        (
            points(n, d * 0 + 1e6, loss),
            "chinchilla",
            UnidentifiableError,
            "same tokens, so B and beta.*fit power_irr instead",
        ),
        (points(n, 20 * n, chinchilla(n, 20 * n)), "chinchilla", UnidentifiableError, r"lockstep.*only L\(C\)"),
        (points(n, d, loss * 0 + 2), "chinchilla", NoSignalError, "loss is the same at every point"),
        (points(n, d, loss), "kaplan", UserError, "form 'kaplan' is unknown; there are chinchilla"),
    ):
        with pytest.raises(kind, match=message):
            fit_law(wrong, form)
    with pytest.raises(UserError, match=r"point 3 \(run r2\): loss is nan"):
        points(n, d, np.where(np.arange(30) == 2, np.nan, loss))


def test_no_interval_below_k_plus_3_points() -> None:
    """LlamaGen's published FIDs at four sizes, fitted with a floor, predict the fifth, but without an interval."""
    n = np.array([110_888_448, 342_910_976, 774_699_520, 1_410_972_672], float)
    fit = fit_law(points(n, n, np.array([6.09, 3.07, 2.62, 2.34])), "power_irr", "l2")
    assert fit.predict(3_096_659_200.0, 1.0) == pytest.approx(2.296, abs=0.01)  # measured: 2.18
    with pytest.raises(TooFewPointsError, match=r"4 points are too few for a confidence interval.*at least 6"):
        bootstrap(fit)


def test_runs_are_drawn_whole_where_there_are_enough() -> None:
    given = noisy(2, 0.003)
    many = bootstrap(fit_law(given), 50)
    assert many.method.startswith("case bootstrap: 50 draws of 30 points")
    few = Points(given.params, given.tokens, given.loss, tuple(f"n{n:.0f}" for n in given.params))
    assert (
        "for the 30 points (5 runs are too few to draw whole runs; points of one run"
        in bootstrap(fit_law(few), 50).method
    )
    pairs = Points(given.params, given.tokens, given.loss, tuple(f"run{i // 2}" for i in range(30)))
    drawn = bootstrap(fit_law(pairs), 50)
    assert drawn.method.startswith("cluster bootstrap: 50 draws of 15 whole runs")
    assert not (drawn.theta == many.theta).all()  # twin: points drawn one by one give other refits
    again = bootstrap(fit_law(given), 50)
    assert (many.theta == again.theta).all()
    assert many.stationary > 0.9


@pytest.mark.long
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


CSV = "params,tokens,loss,run\n1e6,2e7,3.5,a\n2e6,2e7,3.25,b\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "runs.csv: empty; it needs a header"),
        ("params,tokens,loss\n", "runs.csv: a header and no runs"),
        (CSV.splitlines()[0] + "\n\n , , ,\n", "runs.csv: a header and no runs"),
        (CSV.replace("loss", "train_loss"), "the column loss is missing"),
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


def test_every_seed_of_the_largest_size_is_left_out_and_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d = grid(SIZES[-4:], BUDGETS[:3])
    monkeypatch.setattr("llamagen_dist.scaling.study.attempt", lambda fit: (None, "no band is looked at here"))
    rows = ["params,tokens,loss,run"]
    for seed, factor in enumerate((1.01, 0.99)):
        for a, b, c in zip(n, d, chinchilla(n, d) * factor, strict=True):
            rows.append(f"{a:.17g},{b:.17g},{c:.17g},s{a:.0f}-{seed}")
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    out = tmp_path / "fit.json"
    command = ["scaling", "fit", str(tmp_path / "runs.csv"), "--out", str(out), "--hold-out"]
    main([*command, "largest"])
    fit = json.loads(out.read_text())
    ends = [one for one in fit["predictions"] if one["tokens"] == d.max()]
    assert [one["name"] for one in ends] == [f"s{n.max():.0f}-{seed}" for seed in (0, 1)]
    assert not any(row["params_fit"] == n.max() for row in fit["points"] if not row["held_out"])
    smaller = sorted(set(n))[-2]
    between = float(chinchilla(np.array([smaller]), np.array([d.max()]))[0])
    assert all(one["naive"] == pytest.approx(between, rel=1e-9) for one in ends), "the mean of both seeds"
    assert all(one["naive_from"] == "the mean of 2 runs of the next smaller size" for one in ends)
    main([*command, ends[0]["name"]])  # twin: one seed alone leaves the other in the fit
    fit = json.loads(out.read_text())
    assert any(row["params_fit"] == n.max() for row in fit["points"] if not row["held_out"])


positive = st.floats(1e-300, 1e300)
name = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).map(lambda text: text.replace('"', "'"))


@given(
    st.lists(st.tuples(positive, positive, positive, name), min_size=1, max_size=20, unique_by=lambda row: row[3]),
    st.permutations(range(4)),
)
def test_a_csv_is_read_back_exactly(rows: list[tuple[float, float, float, str]], order: list[int]) -> None:
    header = ["params", "tokens", "loss", "run"]
    lines = [",".join(header[i] for i in order)]
    lines += [",".join(f'"{row[3]}"' if i == 3 else repr(row[i]) for i in order) for row in rows]
    found, _, _ = parse_csv("\r\n".join(lines), "x", Options(as_given=True))
    assert list(zip(found.params, found.tokens, found.loss, found.runs, strict=True)) == rows


@settings(max_examples=200)
@given(
    st.text() | st.text("params,tokens,loss\n\r1e9.-\"'", max_size=60).map(lambda text: "params,tokens,loss\n" + text)
)
def test_any_text_is_points_or_one_sentence(text: str) -> None:
    try:
        found, _, _ = parse_csv(text, "x")
    except UserError as error:
        message = str(error)
    else:
        assert len(found) >= 1
        assert ((found.params > 0) & np.isfinite(found.loss)).all()
        message = "x"
    assert message.startswith("x")
