"""What forked ranks need of the process that forks them."""

import subprocess
import sys

import pytest

COMPILED = "import torch; torch.compile(lambda x: x.sin().sum())(torch.ones(3, requires_grad=True)).backward()"
RANKS = """
from tests.ranks.forked import run_ranks
def backward():
    torch.ones(3, requires_grad=True).sum().backward()
    return torch.distributed.get_rank()
assert run_ranks(backward, 2) == [0, 1]
"""


@pytest.mark.long  # the compiler takes seconds
@pytest.mark.parametrize("late", [False, True])
def test_forked_ranks_go_backward_after_a_compiled_test(late):
    """As all test files are imported before the first test runs. Twin (late): imported after it only."""
    code = COMPILED + RANKS if late else "from tests.ranks import forked\n" + COMPILED + RANKS
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode == 0) is not late, ended.stderr
    assert ("Autograd-and-Fork" in ended.stderr) is late
