"""Which rank am I: what the environment says, and what is refused in one sentence; threads that crowd the cores."""

import os
import subprocess
import sys

import pytest
import torch

from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import device_index, ranks_of_environment, start, thread_warning
from tests.ranks.forked import run_ranks

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_what_launchers_set_is_read():
    assert ranks_of_environment(TORCHRUN) == (4, 3)
    assert ranks_of_environment({}) == (1, 0)
    assert ranks_of_environment({"WORLD_SIZE": "1", "RANK": "0"}) == (1, 0), "one rank needs no address"


@pytest.mark.parametrize(
    ("left", "named"),
    [
        ({"WORLD_SIZE": "4"}, "RANK and MASTER_ADDR and MASTER_PORT"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "but MASTER_ADDR not"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "1", "RANK": ""}, "RANK is ''"),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'"),
        ({**TORCHRUN, "RANK": "4"}, "RANK is 4"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_what_an_earlier_job_left_in_the_shell_is_one_sentence(monkeypatch, left, named):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        start()
    assert named in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_device_per_rank_or_the_only_one_that_is_bound_to_it():
    assert [device_index(local, 4) for local in range(4)] == [0, 1, 2, 3]
    assert [device_index(local, 1) for local in range(8)] == [0] * 8, "bound one to each"
    with pytest.raises(UserError, match="rank 4 of this machine has no GPU of its own: 4 are visible"):
        device_index(4, 4)


def test_the_number_to_export_is_named():
    assert "4 CPU threads (2 ranks of this machine) share 2 cores" in thread_warning([2, 2], 2)
    assert thread_warning([2, 2], 2).endswith("export OMP_NUM_THREADS=1")
    assert thread_warning([9, 8], 16).endswith("export OMP_NUM_THREADS=8")
    assert thread_warning([8], 4).endswith("export OMP_NUM_THREADS=4")
    assert thread_warning([2, 2], 4) == "", "twin: they fit"
    assert thread_warning([1, 1, 1], 2) == "", "there is no smaller number to export"


def _start_with(threads: int, cores: list[list[int]]) -> None:
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores[int(os.environ["RANK"])])
    start()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core only")
def test_every_rank_says_it_and_ranks_bound_to_cores_of_their_own_do_not(capfd):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    run_ranks(_start_with, 2, 2, [[first, second]] * 2)
    said = capfd.readouterr().out
    assert all(f"rank {rank}: 4 CPU threads (2 ranks of this machine) share 2 cores" in said for rank in (0, 1))
    run_ranks(_start_with, 2, 1, [[first], [second]])
    assert "CPU threads" not in capfd.readouterr().out
    run_ranks(_start_with, 2, 2, [[first], [second]])
    assert "rank 1: 4 CPU threads" in capfd.readouterr().out, "cores of all ranks together: two, for four threads"


@pytest.mark.long
@pytest.mark.parametrize(
    ("imports", "left"),
    [
        ("from llamagen_dist.parallel.topology import _megatron; _megatron(); import megatron.core.tensor_parallel", 0),
        ("import megatron.core.parallel_state", 2),  # twin: what it leaves behind when it is imported as it is
    ],
)
def test_a_rank_that_ends_without_exit_handlers_leaves_no_temporary_folders(imports, left, tmp_path):
    words = [sys.executable, "-W", "ignore", "-c", f"import os; {imports}; os._exit(0)"]
    subprocess.run(words, env=os.environ | {"TMPDIR": str(tmp_path)}, check=True, timeout=300)
    assert len(list(tmp_path.glob("*wandb*"))) == left
