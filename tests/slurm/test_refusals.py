"""What cannot be launched is one sentence before anything is written or submitted."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamagen_dist.config import load
from llamagen_dist.errors import UserError
from llamagen_dist.launch.slurm import queue
from llamagen_dist.launch.slurm.submit import size_of
from tests.slurm.toy import ROOT, Toy, wait_for


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("refusals"))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(toy: Toy, name: str, *more: str, **profile: Any) -> str:
    """The sentence; nothing was written or submitted."""
    before, jobs = everything(toy.run(name)), set(queue.my_jobs())
    done = toy.launch(name, "5 0.1 1", *more, **profile)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("llamagen: error: ")
    assert "Traceback" not in done.stderr
    assert everything(toy.run(name)) == before
    assert set(queue.my_jobs()) == jobs
    return done.stderr


@pytest.mark.parametrize(
    ("more", "profile", "sentence"),
    [
        ([], {"nods": 2}, "did you mean nodes"),
        (["--gpus-per-node", "5"], {"ranks_per_node": None}, "5 GPUs per node: the nodes of partition main have 4"),
        ([], {"time": "2", "signal_delay_s": 120}, "120 s before the end of a time slice"),
        ([], {"sbatch": {"nodelist": "n99"}}, "SLURM refused the job"),
    ],
)
def test_a_launch_that_cannot_be(toy: Toy, more: list[str], profile: dict[str, Any], sentence: str) -> None:
    done = toy.launch("impossible", "5 0.1 1", *more, **profile)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert sentence in done.stderr
    assert not any(job.name == "impossible" for job in queue.my_jobs().values())
    assert not (toy.run("impossible") / "launch/lock.json").exists()


@pytest.mark.parametrize(
    ("size", "profile", "sentence"),
    [
        ({"nodes": 5}, {}, "5 nodes: partition main has only 4"),
        ({"nodes": 0}, {}, "--nodes 0: give 1 or more"),
        ({}, {"partition": "gpu"}, "this cluster has no such partition, but main, urgent"),
        ({}, {"ranks_per_node": 9}, "9 ranks with 1 CPUs each: the nodes of partition main have 8 CPUs"),
    ],
)
def test_a_size_that_the_partition_does_not_have(size: dict[str, int], profile: dict[str, Any], sentence: str) -> None:
    own = load(ROOT / "slurm/local.yaml", [f"{key}={value}" for key, value in profile.items()], kind="cluster")
    with pytest.raises(UserError, match=re.escape(sentence)):
        size_of(own, **size)


def test_where_there_is_no_slurm(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(Path(sys.executable).parent))
        done = toy.launch("nowhere", "5 0.1 1")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "no sbatch on PATH" in done.stderr
        assert "slurm/local_cluster.sh up" in done.stderr
        assert not toy.run("nowhere").exists()
        assert toy.launch("nowhere", "5 0.1 1", "--dry-run").stdout.startswith("#!/bin/bash"), (
            "the script needs no SLURM"
        )


def test_a_folder_of_another_config_or_another_user(toy: Toy) -> None:
    assert toy.launch("mine", "2 0.1 1", nodes=1).returncode == 0
    wait_for(lambda: toy.last("mine")["event"] == "done")
    config = yaml.safe_load((toy.run("mine") / "launch/config.yaml").read_text())
    (toy.run("mine") / "config.yaml").write_text(yaml.safe_dump(config))  # as the program itself would have
    assert "another config (optim.lr" in refused(toy, "mine", "optim.lr=0.5", nodes=1)
    (toy.folder / "theirs").mkdir()
    os.chown(toy.folder / "theirs", 65534, 65534)
    assert "belongs to another user (uid 65534)" in refused(toy, "theirs")


def test_a_folder_that_may_not_even_be_read(toy: Toy, tmp_path: Path) -> None:
    """Another user's private folder. Root may read that too, so it gives up its right to; the checkout stays readable,
    wherever it lies."""
    private = tmp_path / "private"
    (private / "run").mkdir(parents=True)
    (private / "run/config.yaml").write_text("kind: gpt\n")
    private.chmod(0o700)
    os.chown(private, 65534, 65534)
    words = ["launch", "tokenizer_training.counting", ROOT / "configs/gpt/quickstart.yaml"]
    words += [f"run_dir={private / 'run'}", "--cluster", ROOT / "slurm/local.yaml"]
    ordinary = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    done = subprocess.run(
        [*ordinary, sys.executable, "-m", "llamagen_dist.cli", *words],
        cwd=toy.root,
        env={**os.environ, "PYTHONPATH": str(toy.root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("llamagen: error: ")
    assert done.stderr.count("\n") == 1
    assert str(private) in done.stderr


def test_a_snapshot_that_is_too_large(toy: Toy) -> None:
    large = toy.root / "tokenizer_training/weights.bin"
    with open(large, "wb") as file:
        file.truncate(301 * 10**6)
    try:
        sentence = refused(toy, "large")
    finally:
        large.unlink()
    assert "more than a snapshot may hold (300 MB)" in sentence
    assert "tokenizer_training/weights.bin" in sentence


def test_odd_names_run_and_ones_that_slurm_reads_are_refused(toy: Toy) -> None:
    odd = "a run; $(touch x) & 'näme'"
    done = toy.launch(odd, "2 0.1 1", nodes=1)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: toy.last(odd)["event"] == "done")
    job = queue.my_jobs()[toy.job(odd)]
    assert job.name == "a-run-touch-x-n-me"
    assert len(list((toy.run(odd) / "log").glob("*/*_1_log.out"))) == 1
    assert "SLURM reads %" in refused(toy, "100%j")


def test_without_accounting_every_state_is_still_right(toy: Toy) -> None:
    said = subprocess.run(["sacct"], capture_output=True, text=True, check=False)
    assert "disabled" in said.stderr
    toy.launch("ok", "2 0.1 1", nodes=1)
    toy.launch("waits", "2 0.1 1", nodes=1, sbatch={"hold": True})
    toy.launch("gone", "90 0.1 1", nodes=1)
    queue.cancel([toy.job("gone")])
    wait_for(lambda: toy.last("ok")["event"] == "done" and not queue.my_jobs()[toy.job("gone")].alive)
    words = [sys.executable, "-m", "llamagen_dist.cli", "status", "--json"]
    shown = subprocess.run(
        [*words, *(str(toy.run(name)) for name in ("ok", "waits", "gone"))], capture_output=True, text=True, check=True
    )
    rows = {Path(row["folder"]).name: row for row in yaml.safe_load(shown.stdout)["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "ok": "finished",
        "waits": "waiting",
        "gone": "stopped",
    }
    assert "cancelled" in rows["gone"]["reason"].lower()
    queue.cancel([toy.job("waits")])
