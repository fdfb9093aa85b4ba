"""What a process says of itself, and how it recognises that another one has gone."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llamagen_dist.errors import LOST_PEER
from llamagen_dist.process import peak_rss_gb

ROOT = Path(__file__).parent.parent.parent
MB = 1 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only: elsewhere getrusage is all there is")
def test_the_peak_is_this_process_own_not_that_of_the_one_that_started_it():
    large = bytearray(600 * MB)
    assert peak_rss_gb() > 0.6
    code = "import resource; from llamagen_dist.process import peak_rss_gb; "
    code += "print(peak_rss_gb(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    own, inherited = (float(word) for word in ran.stdout.split())
    assert 0.005 < own < 0.2
    assert inherited > 0.6, "the twin: what getrusage says of a started program"
    del large


def test_the_peak_of_ended_children_counts_on_request():
    subprocess.run([sys.executable, "-c", f"bytearray({900 * MB})"], check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 > 900 * MB
    assert peak_rss_gb(children=True) > 0.9


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2000", True),
        ("Timed out waiting 1000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),
        ("NCCL communicator was aborted on rank 3", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
        ("the learning rate is a pair", False),
    ],
)
def test_an_error_of_a_collective_is_told_from_one_of_our_own(message, lost):
    assert bool(LOST_PEER.search(message)) is lost
