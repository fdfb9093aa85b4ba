"""Sweeps: points and their names, what is refused before anything starts, and the plan of all of them."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist import cli
from llamagen_dist.config import dump, load
from llamagen_dist.config.launch import SweepConfig
from llamagen_dist.errors import UserError
from llamagen_dist.files import write_text
from llamagen_dist.launch import points
from llamagen_dist.launch.graph import Graph
from llamagen_dist.launch.state import state_of
from llamagen_dist.planning import sweep as planning
from llamagen_dist.planning.plan import Machine
from llamagen_dist.tracking.devices import named

ROOT = Path(__file__).parents[2]
MODULE = "llamagen_dist.train_gpt"


def file(folder: Path, **keys: Any) -> Path:
    path = folder / "sweep.yaml"
    content = {"kind": "sweep", "title": "t", "module": MODULE, "config": str(ROOT / "configs/gpt/GPT-B.yaml"), **keys}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def names(folder: Path, **keys: Any) -> list[str]:
    return [point.name for point in points.sweep(file(folder, **keys), folder / "out").nodes]


def refusal(folder: Path, *words: str, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        points.sweep(file(folder, **keys), folder / "out", words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_grid_zip_and_list_multiply_and_names_say_what_differs(tmp_path: Path) -> None:
    made = points.sweep(
        file(
            tmp_path,
            set={"train.images": 2560},
            grid={"optim.lr": [0.0001, 3e-4], "train.seed": [0]},
            zip={"train.global_batch": [128, 256], "optim.weight_decay": [0.05, 0.1]},
            list=[{"ema.decay": 0.0}, {"ema.decay": 0.9999}],
        ),
        tmp_path / "out",
    )
    assert len(made.nodes) == 8
    first, last = made.nodes[0], made.nodes[-1]
    assert first.name == "decay-0_global_batch-128_weight_decay-0.05_lr-1e-4"
    assert last.name == "decay-0.9999_global_batch-256_weight_decay-0.1_lr-3e-4"
    config: Any = last.config
    assert (config.optim.lr, config.optim.weight_decay, config.train.global_batch) == (3e-4, 0.1, 256)
    assert (config.train.images, config.ema.decay, config.train.seed) == (2560, 0.9999, 0)
    assert config.run_dir == tmp_path / "out" / last.name
    assert "seed" not in first.name, "one value tells nothing apart"


def test_names_of_ones_own_and_values_of_every_kind(tmp_path: Path) -> None:
    ladder = {"small": {"model.size": "GPT-B"}, "large": {"model.size": "GPT-L"}}
    assert names(tmp_path, list=ladder) == ["small", "large"]
    assert names(tmp_path, list=ladder, grid={"train.seed": [1, 2]})[1] == "small_seed-2"
    assert names(tmp_path, grid={"model.size": ["GPT-B", "GPT-L"]}) == ["size-GPT-B", "size-GPT-L"]
    assert names(tmp_path, grid={"optim.betas": [[0.9, 0.95], [0.9, 0.999]]})[1] == "betas-0.9-0.999"
    assert names(tmp_path, grid={"compute.compile": [True, False]}) == ["compile-true", "compile-false"]
    assert names(tmp_path, grid={"data.train": ["a/b", "/c d/e"]}) == ["train-a-b", "train-c-d-e"]
    assert names(tmp_path, grid={"train.micro_batch": [None, 4]}) == ["micro_batch-none", "micro_batch-4"]
    both = {"checkpoint.every_images": [256, 512], "validation.every_images": [256]}
    assert names(tmp_path, grid=both) == ["every_images-256", "every_images-512"]
    both["validation.every_images"] = [256, 512]
    assert names(tmp_path, grid=both)[1] == "checkpoint.every_images-256_validation.every_images-512"
    given = names(tmp_path, grid={"optim.lr": [1e-4, 2e-4]}, name="rate {optim.lr}/x")
    assert given == ["rate-1e-4-x", "rate-2e-4-x"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_in_a_name_is_that_number_and_fits_a_file_name(value: float) -> None:
    word = points._word(value)
    assert float(word) == value
    assert re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?", word)
    assert "e+" not in word


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=150)


@settings(max_examples=50)
@given(st.lists(PLAIN | st.lists(PLAIN, max_size=3), min_size=1, max_size=4))
def test_any_values_give_file_names_that_differ_or_a_refusal(values: list[Any]) -> None:
    rows = [points.Row({"optim.lr": value, "train.seed": number}) for number, value in enumerate(values)]
    try:
        found = points.name_points(rows, None, "x.yaml")
    except UserError:
        assert any(len(repr(value)) > 40 for value in values), "only a name that is too long can be refused here"
        return
    assert len(set(found)) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9+._-]+", name) and not name.startswith(".") for name in found)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    assert "give points" in refusal(tmp_path)
    assert "zip: its keys go together" in refusal(tmp_path, zip={"optim.lr": [1], "train.seed": [1, 2]})
    assert "two points would be called 'train-a-b'" in refusal(tmp_path, grid={"data.train": ["a/b", "a b"]})
    assert "{optim.eps} is not set" in refusal(tmp_path, grid={"optim.lr": [1e-4, 2e-4]}, name="{optim.eps}")
    assert "two points would be called 'x'" in refusal(tmp_path, grid={"optim.lr": [1e-4, 2e-4]}, name="x")
    for name in ("code", "stages", "checkpoints"):  # a report would take the last two for a pipeline's, a run's folder
        assert f"cannot be called {name!r}" in refusal(tmp_path, list={name: {"train.seed": 1}})
    assert "grid sets model and zip sets model.dim" in refusal(
        tmp_path, grid={"model": [{"size": "GPT-B"}]}, zip={"model.dim": [64]}
    )
    assert "point lrr-1" in (unknown := refusal(tmp_path, grid={"optim.lrr": [1, 2]}))
    assert "did you mean optim.lr?" in unknown
    assert "run_dir is set by the sweep" in refusal(tmp_path, grid={"run_dir": ["a", "b"]})
    assert "run_dir is set by the sweep" in refusal(tmp_path, "run_dir=x", grid={"train.seed": [1, 2]})
    assert "train.seed is swept by" in refusal(tmp_path, "train.seed=3", grid={"train.seed": [1, 2]})
    many = {f"optim.{key}": list(range(1, 30)) for key in ("lr", "eps", "clip")}
    assert "24,389 points are more" in refusal(tmp_path, grid=many)
    other = str(ROOT / "configs/pipeline/quickstart.yaml")
    assert "kind pipeline writes into no folder" in refusal(tmp_path, config=other, grid={"title": ["a", "b"]})


def test_programs_that_make_files_get_a_folder_each(tmp_path: Path) -> None:
    sample, evaluate = (str(ROOT / f"configs/eval/{name}.yaml") for name in ("sample", "plain"))
    made = points.sweep(file(tmp_path, config=sample, grid={"cfg_scale": [1.5, 2.0]}), tmp_path / "out")
    assert [p.config.out for p in made.nodes] == [p.folder / "out" for p in made.nodes]  # type: ignore[union-attr]
    made = points.sweep(file(tmp_path, config=evaluate, grid={"seed": [1, 2]}), tmp_path / "out")
    assert made.nodes[1].config.out == tmp_path / "out/seed-2/evaluation.json"  # type: ignore[union-attr]


def started(made: Graph, *which: int) -> None:
    made.out.mkdir(exist_ok=True)
    made.keep()
    for number in which:
        made.nodes[number].prepare()


def test_another_sweep_in_the_folder_is_refused_and_more_points_are_not(tmp_path: Path) -> None:
    grid = {"optim.lr": [1e-4, 2e-4]}
    out = tmp_path / "out"

    def again(*words: str, **keys: Any) -> Graph:
        return points.sweep(file(tmp_path, **{"grid": grid, **keys}), out, words)

    started(again(), 0, 1)
    again().check()
    again(grid={"optim.lr": [1e-4, 2e-4, 4e-4]}).check()
    again("train.micro_batch=4", "guard.hang_minutes=3").check()  # how it is run, not what it computes
    for wrong, said in (
        (again("train.seed=1"), "point lr-1e-4 was started with another config (train.seed: 0 -> 1)"),
        (again(grid={"optim.lr": [1e-4, 4e-4]}), "points that this sweep does not have (lr-2e-4)"),
        (again(module="llamagen_dist.cli"), "holds a sweep of llamagen_dist.train_gpt"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            wrong.check()
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").touch()
    with pytest.raises(UserError, match="holds no sweep"):
        points.sweep(file(tmp_path, grid=grid), foreign).check()


def test_a_point_is_trained_for_longer_as_a_run_is(tmp_path: Path) -> None:
    """What a run accepts when it is started again, a point accepts; and a finished one is then open again."""
    out, base = tmp_path / "out", {"train.images": 2560}

    def again(**settings: Any) -> Graph:
        return points.sweep(file(tmp_path, set=base | settings, grid={"optim.lr": [1e-4, 2e-4]}), out)

    def kinds(made: Graph) -> list[str]:
        return [point.reopened(state_of(point.job, {})).kind for point in made.nodes]

    started(again(), 0, 1)
    for point in again().nodes:
        write_text(point.job.done, "{}")
    assert kinds(again()) == ["finished", "finished"]
    assert kinds(again(**{"log.every_steps": 3})) == ["finished", "finished"]
    longer = again(**{"train.images": 5120})
    longer.check()
    assert kinds(longer) == ["open", "open"]
    cooled = again(**{"optim.schedule": "wsd", "optim.cooldown_from": 1280, "optim.cooldown_images": 1280})
    cooled.check()
    assert kinds(cooled) == ["open", "open"], "the run goes back to a checkpoint from before the cooldown"
    with pytest.raises(UserError, match=r"train.images: 2560 -> 1280"):
        again(**{"train.images": 1280}).check()
    with pytest.raises(UserError, match=r"train.images: 2560 -> 5120"):  # the stages after it have used its points
        longer.check(stage=True)
    with pytest.raises(UserError, match=r"config \(train.seed: 0 -> 1\)"):  # sabotage twin: not all is allowed now
        again(**{"train.images": 5120, "train.seed": 1}).check()


def test_the_state_of_a_point_is_what_its_folder_says(tmp_path: Path) -> None:
    made = points.sweep(file(tmp_path, grid={"optim.lr": [1e-4, 2e-4, 4e-4]}), tmp_path / "out")
    started(made, 0, 1)
    write_text(made.nodes[0].job.done, "{}")
    write_text(made.nodes[1].folder / "launch/FAILED.json", json.dumps({"reason": "loss became nan at step 7"}))
    states = [state_of(point.job, {}) for point in made.nodes]
    assert [state.kind for state in states] == ["finished", "failed", "open"]
    assert states[1].reason == "loss became nan at step 7"


def test_the_sweep_that_is_kept_is_the_one_that_was_given(tmp_path: Path) -> None:
    made = points.sweep(file(tmp_path, grid={"optim.lr": [1e-4, 2e-4]}), tmp_path / "out", ["train.seed=3"])
    write_text(tmp_path / "kept.yaml", dump(made.config))
    kept: SweepConfig = load(tmp_path / "kept.yaml", kind="sweep")
    again = points.sweep(tmp_path / "kept.yaml", tmp_path / "out")
    assert kept == made.config
    assert [p.identity() for p in again.nodes] == [p.identity() for p in made.nodes]


def test_the_plan_of_a_sweep_adds_up(tmp_path: Path) -> None:
    made = points.sweep(
        file(tmp_path, list=[{"model.size": "GPT-B"}, {"model.size": "GPT-3B", "train.micro_batch": 32}]),
        tmp_path / "o",
    )
    machine = Machine(named("A100-40"), 8)
    small, large = (planning.need(p.name, p.config, machine) for p in made.nodes)
    assert small.parameters == 110_888_448
    assert large.fits is False
    assert large.gpu_hours is not None
    assert small.gpu_hours is not None
    assert large.gpu_hours > 20 * small.gpu_hours
    text = " ".join(planning.totals([small, large], ["finished", "open"], machine, 2))
    assert f"{large.gpu_hours:,.0f} GPU-hours" in text, "what is finished is not counted again"
    assert "1 do not fit on A100-40" in text
    odd = planning.need("odd", made.nodes[0].config, Machine(named("A100-40"), 7))
    assert odd.refused is not None
    assert "256 images cannot be shared equally by 7 data-parallel ranks" in odd.refused


def test_hours_of_points_side_by_side() -> None:
    assert planning.elapsed([3, 1, 1, 1], 2) == 3
    assert planning.elapsed([1, 1, 1, 3], 2) == 4
    assert planning.elapsed([1, 2, 3], 1) == 6


@pytest.mark.parametrize("cluster", ["local", str(ROOT / "slurm/local.yaml")])
def test_five_hundred_points_are_planned_in_less_than_three_seconds(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # where there is no SLURM to ask
    grid = {"optim.lr": [n * 1e-5 for n in range(1, 26)], "train.seed": list(range(20))}
    began = time.process_time()  # whatever else this machine does; a terminal shows it in 1 to 2 s
    words = ["sweep", str(file(tmp_path, grid=grid)), "--out", str(tmp_path / "out"), "--dry-run"]
    cli.main([*words, "--cluster", cluster])
    assert time.process_time() - began < 3
    shown = capsys.readouterr().out
    assert "500 points, 0 of them finished" in shown
    assert "lr-2.5e-4_seed-19" in shown
    assert ("#SBATCH --array=0-499" in shown) == (cluster != "local")
    assert not (tmp_path / "out").exists()
