"""What needs no second rank: MFU's arithmetic, the settings of NCCL's recorder, and what a line leaves out."""

import os

import pytest
import torch

from llamagen_dist.parallel.clock import Clock
from llamagen_dist.parallel.topology import Topology, record_collectives
from llamagen_dist.tracking.log_line import LogWindow


def window(**known: int) -> LogWindow:
    return LogWindow(Topology(), Clock(), 16, **known)


def test_mfu_is_flops_done_over_flops_possible_and_absent_where_the_device_is_unknown():
    metrics = {"loss": torch.tensor(2.0)}
    unknown = window(flops_per_image=10**9)
    unknown.count(None)
    assert "mfu" not in unknown.line(metrics), "a CPU has no peak here"
    known = window(flops_per_image=10**9)
    known._peak = 5e12
    known.count(None)
    known.count(None)
    line = known.line(metrics)
    assert line["mfu"] == pytest.approx(line["images_per_s"] * 1e9 / 5e12, abs=1e-4)
    assert "tokens_per_s" not in line


def test_a_line_has_only_numbers_that_json_knows():
    one = window(tokens_per_image=4)
    one.count(torch.arange(3))
    line = one.line(
        {"loss": torch.tensor(float("nan")), "grad_norm": torch.tensor(float("inf")), "lr": torch.tensor(0.5)}
    )
    assert {"loss", "grad_norm"}.isdisjoint(line)
    assert line["lr"] == 0.5


def test_nccls_recorder_writes_into_the_run(tmp_path, monkeypatch):
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    record_collectives(tmp_path / "log")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7", "what a site has set stays"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "log" / "nccl-rank-")
