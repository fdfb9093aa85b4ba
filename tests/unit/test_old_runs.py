"""Run folders that the launcher of before November 2026 left (tests/golden/old_run): they show in status and resume."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llamagen_dist.files import json_if_there
from llamagen_dist.launch import points, stages
from llamagen_dist.launch.folder import JobFolder
from llamagen_dist.launch.graph import single
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.state import state_of
from llamagen_dist.launch.status.survey import look
from tests.runs.checkout import ROOT, checkout, llamagen

GOLDEN = ROOT / "tests/golden/old_run"


def old_runs(folder: Path) -> Path:
    """The folders with the paths of this machine in them."""
    code = checkout(folder / "code", "runs/toy_program.py", "runs/toy_run.py")
    old = folder / "old"
    shutil.copytree(GOLDEN, old)
    for file in old.rglob("*"):
        if file.is_file():
            text = file.read_text()
            for word, path in (("@OLD@", old), ("@CODE@", code), ("@ROOT@", ROOT)):
                text = text.replace(word, str(path))
            file.write_text(text)
    for file in old.rglob("stage.json"):  # its DONE.json names the digest of what has paths in it
        identity = json.dumps(json.loads(file.read_text())["identity"], sort_keys=True)
        if (done := json_if_there(file.with_name("DONE.json"))) is not None:
            done["config_sha256"] = hashlib.sha256(identity.encode()).hexdigest()
            file.with_name("DONE.json").write_text(json.dumps(done))
    return old


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return old_runs(tmp_path)


def states(*folders: Path) -> dict[str, str]:
    return {row.name: row.state.name for row in look(folders).rows}


def test_they_show_in_status(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "my_jobs", lambda *_: {})  # SLURM has forgotten them
    assert states(*sorted((old / "here").iterdir())) == {
        "failed": "failed",
        "launch": "finished",
        "pipeline": "stopped",
        **dict.fromkeys(("a", "train", "ladder", "small", "large"), "finished"),
        "count": "stopped",
        "last": "waiting",
        **{"sweep": "failed", "good": "finished", "bad": "failed"},
    }
    assert states(old / "slurm/pipeline") == {
        "pipeline": "failed",
        **dict.fromkeys(("a", "ladder", "small", "large"), "finished"),
        "fragile": "failed",
        "last": "stopped",
    }
    assert states(old / "slurm/sweep") == {"sweep": "failed", "good": "finished", "bad": "failed"}
    assert states(old / "slurm/launch") == {"launch": "finished"}
    (cancelled,) = look([old / "slurm/cancelled"]).rows
    assert (cancelled.state.name, cancelled.progress.saved_step) == ("stopped", 15)
    (failed,) = look([old / "here/failed"]).rows
    assert "thirteen is nonsense" in failed.state.reason


def test_what_they_were_started_with_is_known(old: Path) -> None:
    """Of both kinds of machine: what is finished is skipped, another config is refused."""
    for where, file in (("here", "pipeline.yaml"), ("slurm", "pipeline_s.yaml")):
        graph = stages.plan(old / file, old / where / "pipeline")
        graph.nodes[0].changes()
        finished = [node.name for node in graph.nodes if node.is_finished()]
        assert finished == [node.name for node in graph.nodes][: len(finished)]
        assert {"a", "ladder"} <= set(finished)
        assert not any(node.changes() for node in graph.programs())
        sweep = points.sweep(old / "sweep.yaml", old / where / "sweep")
        found = [state_of(point.job, {}) for point in sweep.nodes]
        assert [state.kind for state in found] == ["finished", "failed"]
        assert "thirteen is nonsense" in found[1].reason
        other: Any = points.sweep(old / "sweep.yaml", old / where / "sweep", ["train.images=6400"])
        assert other.nodes[0].changes() == ["train.images: 640 -> 6400"]
    done = JobFolder.of(old / "slurm/launch")
    assert done.is_done()
    assert state_of(JobFolder.of(old / "slurm/cancelled"), {}).kind == "open"
    from llamagen_dist.config import load

    config = load(old / "gpt.yaml", [f"run_dir={old / 'here/launch'}"])
    assert single("tokenizer_training.toy_run", config).nodes[0].changes() == []


def test_a_pipeline_and_a_sweep_resume(old: Path, tmp_path: Path) -> None:
    out = old / "here/pipeline"
    done = llamagen(tmp_path / "code", "pipeline", old / "pipeline.yaml", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished earlier") == 3
    assert "[4/5] count" in done.stdout
    assert (out / "work/touched.txt").read_text() == "xx", "by the first stage long ago, by the last one now"
    spent = json.loads((out / "stages/count/launch/DONE.json").read_text())["seconds"]
    earlier = json.loads((GOLDEN / "here/pipeline/stages/count/stage.json").read_text())["spent_s"]
    assert spent > earlier, "of both attempts"
    sweep = old / "here/sweep"
    (sweep / "mended").touch()
    again = llamagen(tmp_path / "code", "sweep", old / "sweep.yaml", "--out", sweep, "--retry-failed")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "good — finished earlier" in again.stdout
    assert set(states(out).values()) == {"finished"}
    assert states(sweep) == {"sweep": "finished", "good": "finished", "bad": "finished"}
    assert not list(sweep.glob("*/launch/END.json"))
