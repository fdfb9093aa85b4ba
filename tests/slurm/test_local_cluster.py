"""slurm/local_cluster.sh itself: what it starts, what it refuses."""

import os
import subprocess

import pytest

from tests.slurm import local_cluster


def run(words: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_two_nodes_run_two_ranks_each():
    done = run(["srun", "-N2", "--ntasks-per-node=2", "-t1", "sh", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME"])
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert sorted(found) == ["0", "1", "2", "3"]
    assert found["0"] == found["1"] != found["2"] == found["3"]


def test_more_gpus_than_a_node_has_are_refused_by_this_slurm():
    assert run(["srun", "-t1", "--gres=gpu:4", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]).stdout == "0,1,2,3\n"
    assert "not available" in run(["srun", "-t1", "--gres=gpu:5", "true"]).stderr


@pytest.mark.parametrize(
    ("words", "environment", "sentence"),
    [
        (["up"], {"PATH": "/nowhere"}, "SLURM is not installed"),
        (["up"], {"LLAMAGEN_SLURM_DIR": "/tmp/" + "x" * 90}, "too long for the path of a socket"),
        (["up"], {"LLAMAGEN_SLURM_DIR": "/tmp/llamagen-slurm-second"}, "is in use; choose another"),
        (["status"], {"LLAMAGEN_SLURM_DIR": "/tmp/llamagen-slurm-second"}, "is not up; start it"),
        (["node-down", "n99"], {}, "give the name of a node"),
        ([], {}, "use: "),
    ],
)
def test_what_it_cannot_do_is_one_sentence(words: list[str], environment: dict[str, str], sentence: str):
    done = run(["/bin/bash", str(local_cluster.SCRIPT), *words], **environment)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_up_twice_is_one_cluster():
    assert local_cluster.call("up").startswith("already up")
