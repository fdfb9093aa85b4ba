"""A run folder as it was written before issue 13 (commit d63614b) still resumes, is sampled, started from, converted.

golden/old_checkpoint.tar.xz holds a tokenizer, token shards, a GPT's run whose last checkpoint and summary were taken
away, and what they were: end.safetensors (its weights at the end) and drawn/ (pictures from those).
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval.sample as sample
from llamagen_dist import train_gpt
from llamagen_dist.cli import main
from tests.checkpoints import identity, read_weights

GOLDEN = Path(__file__).parent.parent / "golden" / "old_checkpoint.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # its config names its data from there
    return tmp_path


def test_it_resumes_to_the_weights_that_it_ended_with_and_is_sampled_as_then(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_weights(old / "gpt")
    train_gpt.main(["gpt.yaml"])
    assert "resumed from gpt/checkpoints/step_00000004 at image 32 of 64" in capsys.readouterr().out
    expected, found = load_file(old / "end.safetensors"), read_weights(old / "gpt")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    moved = max(float((before[name] - expected[name]).abs().max()) for name in expected)
    assert moved > 1e-2, "the twin: the weights at the resume are others"
    lines = [json.loads(line) for line in (old / "gpt" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert sorted(set(steps)) == steps, "no step appears twice"
    sample.main(["sample.yaml", "out=again"])
    then, now = (np.load(old / out / "model.npz") for out in ("drawn", "again"))
    assert np.array_equal(then["labels"], now["labels"])
    near = np.abs(then["arr_0"].astype(int) - now["arr_0"].astype(int)) <= 1
    assert near.mean() > 0.9
    records = [json.loads((old / out / "record.json").read_text()) for out in ("drawn", "again")]
    assert records[0]["tokenizer_sha256"] == records[1]["tokenizer_sha256"]


def test_it_is_generated_from_started_from_and_converted(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "gpt", "--class", "class 2", "--per-class", "2", "--out", "a.png"])
    assert (old / "a.png").exists()
    main(["generate", "gpt", "--weights", "ema", "--class", "all", "--per-class", "1", "--out", "b.png"])
    main(["convert", "gpt", "gpt.pt"])
    main(["convert", "tokenizer", "tokenizer.safetensors"])
    for run, file in (("gpt", "gpt.pt"), ("tokenizer", "tokenizer.safetensors")):
        assert identity(old / run) == identity(old / file)
    capsys.readouterr()
    train_gpt.main(["gpt.yaml", "run_dir=new", "init_from=gpt", "init_weights=ema", "train.images=8"])
    said = capsys.readouterr().out
    assert f"sha256 {identity(old / 'gpt', 'ema')[:12]}" in said
    assert "the same 4 classes" in said
