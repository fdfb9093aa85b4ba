"""Checkpoints scored by the launcher on this machine: after a kill too each step once, and the training is the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.errors import UserError
from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.tracking import evaluations
from llamagen_dist.train_gpt import main as train_gpt
from tests.runs.sampling_work import tokenizer_run
from tests.runs.scored_run import BATCH, STAGES, ended, scored_work

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return scored_work(tmp_path_factory.mktemp("during"))


def start(work: Path, file: str, name: str, *settings: str) -> "subprocess.Popen[str]":
    words = ["launch", "llamagen_dist.train_gpt", str(work / file), f"run_dir={work / name}", *settings]
    return subprocess.Popen(
        [sys.executable, "-m", "llamagen_dist.cli", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(launcher: "subprocess.Popen[str]", code: int = 0) -> str:
    said, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == code, said
    return said


def losses(run: Path) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "samples") if key in line} for line in lines]


def of_run(run: Path) -> list[int]:
    """Processes that work for the evaluations of a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"evaluate" in words and str(run).encode() in words:
            found.append(int(process.name))
    return found


def wait_for(what: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.long
def test_killed_and_taken_up_again_each_step_is_scored_once_and_the_training_is_the_same(work):
    once, run = dict.fromkeys(STAGES, 1), work / "scored"
    plain = start(work, "gpt.yaml", "plain")
    end(plain)
    assert not (work / "plain/evaluations").exists()
    assert "evaluation" not in (work / "plain/config.yaml").read_text()

    launcher = start(work, "scored.yaml", "scored", "evaluation.here=beside")
    first = evaluations.folder_of(run, 20)
    wait_for(lambda: JobFolder.of(first / "stages/sample").done.exists())
    os.kill(launcher.pid, signal.SIGKILL)
    for pid in of_run(run):
        os.kill(pid, signal.SIGKILL)
    launcher.communicate()
    assert not (first / "result.json").exists(), "it was killed half-way"
    assert (run / "checkpoints/step_00000020/COMPLETE").exists(), "keep_last is 1, and it still waits for its scores"

    end(start(work, "scored.yaml", "scored"))
    assert losses(run) == losses(work / "plain"), "to the last bit"
    lines = evaluations.lines(run)
    assert [(line["step"], line["images_seen"]) for line in lines] == [(20, 20 * BATCH), (40, 40 * BATCH)]
    assert lines == [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert all(line["fid"] > 0 and line["n"] == 4 and line["weights"] == "trained" for line in lines)
    assert [ended(run, 20), ended(run, 40)] == [once, once]
    record = json.loads((first / "result.json").read_text())["record"]
    assert record["sets"]["generated"]["images"]["made_by"]["cfg_scale"] == 2.0, "the passport is whole"
    assert not list(run.glob("evaluations/*/samples/*.npz")), "there is room on the disk again"
    assert (first / "samples/grid.png").exists()

    main(["evaluate", str(run)])
    assert [ended(run, 20), ended(run, 40)] == [once, once]

    (first / "result.json").unlink()
    main(["evaluate", str(run)])
    twice = {"sample": 2, "evaluate": 2, "record": 2}
    assert ended(run, 20) == twice, "sabotage twin: without its mark the step is evaluated again, and that shows"


@pytest.mark.long
def test_an_evaluation_that_fails_is_named_and_harms_nothing(work, capfd):
    broken = work / "broken"
    (work / "grey.npz").write_bytes(b"no zip")
    once = f"evaluation.every_images={40 * BATCH}"
    said = end(start(work, "scored.yaml", "broken", f"evaluation.reference={work / 'grey.npz'}", once))
    assert "step 40: not evaluated: " in said
    assert f"(log: {broken}/evaluations/step-00000040/stages/evaluate/log)" in said
    assert (broken / "summary.json").exists()
    before = len(JobFolder.of(broken / "evaluations/step-00000040/stages/evaluate").events())
    with pytest.raises(SystemExit):
        main(["evaluate", str(broken)])
    assert "its evaluation failed earlier" in capfd.readouterr().out
    assert len(JobFolder.of(broken / "evaluations/step-00000040/stages/evaluate").events()) == before
    np.savez(work / "grey.npz", arr_0=np.random.RandomState(0).randint(0, 255, (4, 16, 16, 3)).astype(np.uint8))
    main(["evaluate", str(broken), "--retry-failed"])
    assert ended(broken, 40) == dict.fromkeys(STAGES, 1), "the pictures were there already"
    assert [line["step"] for line in evaluations.lines(broken)] == [40]


def test_a_tokenizer_that_is_not_the_tokens_own_is_refused_before_the_training(work):
    tokenizer_run(work / "another", 7)
    words = [str(work / "scored.yaml"), f"run_dir={work / 'refused'}"]
    with pytest.raises(UserError, match=r"evaluation\.tokenizer: .*another .* is not the one that made the tokens"):
        train_gpt([*words, f"evaluation.tokenizer={work / 'another'}"])
    with pytest.raises(UserError, match=r"evaluation\.reference: /no/images does not exist"):
        train_gpt([*words, "evaluation.reference=/no/images"])
    with pytest.raises(UserError, match=r"evaluation: the GPT was trained guidance-free .* instead of cfg_scale 2"):
        train_gpt([*words, "model.guidance=free"])
    assert not (work / "refused").exists()
