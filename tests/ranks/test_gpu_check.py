"""``make gpu-check`` on a machine without a GPU: its own sentence, and the whole program at a tiny size."""

from typing import Any

import deepspeed  # noqa: F401 - before the fork, so that ranks start at once
import pytest
import torch

from llamagen_dist.data.prefetch import Prefetcher
from tests.gpu import batches, check, parity, speed
from tests.gpu.table import Row, below, lines
from tests.ranks.forked import run_ranks


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.long
def test_the_whole_program_runs_on_a_cpu(capsys):
    assert check.main(["--device", "cpu", "--small", "--no-compile"]) == 0
    text = capsys.readouterr().out
    for words in (
        "versions: Python",
        "device: CPU",
        "48 of 48 equal",
        "40 of 40 equal",
        "images/s",
        "all checks passed",
    ):
        assert words in text
    assert text.count("\nok ") == 15


def test_a_broken_model_fails_the_parity_rows(monkeypatch):
    """Sabotage twin: another rotation of the prefix."""
    rotated = parity.ready

    def broken(model: Any, device: torch.device, precision: str) -> Any:
        model = rotated(model, device, precision)
        model.rotary[0, :, 0] = 1.0
        return model

    monkeypatch.setattr(parity, "ready", broken)
    rows = list(parity.of_classes(torch.device("cpu"), "fp32"))
    assert any(row.ok is False for row in rows)


def test_batches_that_come_too_late_fail_their_row(monkeypatch):
    """Sabotage twin: every batch is that of the next position."""
    plain = Prefetcher.batch
    monkeypatch.setattr(Prefetcher, "batch", lambda self, position: plain(self, position + 1))
    (row,) = batches.rows(torch.device("cpu"))
    assert row.ok is False


CASES = [
    {**check.TINY, "precision": "bf16", "zero": 1, "micro": 2, "accumulation": 2},
    {**check.TINY, "precision": "bf16", "zero": 1, "micro": 2},
]


def on_ranks(number: int) -> dict[str, Any]:
    return speed.measure(CASES[number], speed.start())


@pytest.mark.long
def test_several_ranks_are_compared_with_one(monkeypatch):
    """What ``together`` asks of torchrun, on forked ranks."""
    answers = iter([run_ranks(on_ranks, 1, 0), run_ranks(on_ranks, 2, 1)[:1]])
    monkeypatch.setattr(check, "train", lambda cases, device, ranks: next(answers))
    rows = list(check.together("cpu", 2, small=True))
    assert rows[0].ok
    assert "of 2 x" in rows[1].wanted


def result(**more: Any) -> dict[str, Any]:
    made = {"out_of_memory": False, "loss": [9.0, 8.5], "seconds": 0.5, "images_per_s": 64.0, "mfu": 0.41}
    return {**made, "peak_bytes": 2**30, "planned_bytes": 2**30, **more}


def test_memory_above_the_plan_and_compiled_losses_that_differ_fail():
    eager = check.size("GPT-B", 32)
    compiled = {**eager, "compile": True}
    good = list(check.speed_rows([eager, compiled], [result(), result(seconds=0.25, loss=[9.001, 8.501])]))
    assert [row.ok for row in good] == [None, True, None, True, None]
    assert good[-1].found == "2.00 x"
    bad = list(check.speed_rows([eager, compiled], [result(peak_bytes=2**31), result(loss=[9.0, 8.0])]))
    assert [row.ok for row in bad] == [None, False, None, False, None]
    (gone,) = check.speed_rows([eager], [{"out_of_memory": True}])
    assert gone.found == "out of memory"


@pytest.mark.parametrize(("value", "ok"), [(1e-6, True), (1.0, False), (float("nan"), False)])
def test_only_a_small_difference_passes(value, ok):
    assert below("a", "b", value, 1e-4).ok is ok


def test_the_table_is_aligned():
    text = lines([Row("a", "b" * 30, "c"), Row("a" * 20, "b", "c", "d", False)])
    assert text[2].startswith("FAIL")
    assert text[1].index("b" * 30) == text[2].index("b")
