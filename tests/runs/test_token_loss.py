"""eval.token_loss: the trainer's held-out loss, position by position, the same bits on any number of ranks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eval.token_loss as program
from llamagen_dist import train_gpt
from llamagen_dist.data.manifest import read_manifest, write_manifest
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import SIZES, quietly
from tests.runs.token_shards import CLASSES, VOCABULARY, write_tokens

COUNT, BATCH = 23, 5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT after two steps of training, with the loss that its run logged."""
    folder = tmp_path_factory.mktemp("token-loss")
    tokens = write_tokens(folder / "tokens", COUNT, 0)
    write_manifest(tokens, replace(read_manifest(tokens), tokenizer_sha256="cd" * 32))
    config = {
        "kind": "gpt",
        "run_dir": str(folder / "run"),
        "model": SIZES,
        "data": {"train": str(tokens), "validation": str(tokens)},
        "train": {"images": 32, "global_batch": 16},
        "optim": {"lr": 0.01},
        "validation": {"every_images": 32, "batch": 7},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    quietly(train_gpt.main, [str(folder / "train.yaml")])
    return folder


def words(work: Path, out: Path, *more: str) -> list[str]:
    file = out.with_suffix(".yaml")
    given = {"kind": "token_loss", "checkpoint": str(work / "run"), "data": str(work / "tokens"), "batch": BATCH}
    file.write_text(yaml.safe_dump(given))
    return [str(file), f"out={out}", *more]


def by_hand(work: Path) -> np.ndarray:
    """float64 [N]: one sample after another through the logits, without the code under test."""
    model = GPT(GPTConfig(**SIZES, vocab_size=VOCABULARY, image_tokens=16, num_classes=CLASSES))
    model.load_state_dict(store.read_weights(work / "run"))
    reader = TokenReader(open_shards(work / "tokens"))
    numbers = np.arange(COUNT)
    codes, labels = reader.codes(numbers, np.zeros_like(numbers)), reader.labels(numbers)
    rows = []
    with torch.no_grad():
        for tokens, label in zip(torch.from_numpy(codes), torch.from_numpy(labels), strict=True):
            logits = model.eval()(tokens[None], label[None])[0].double()
            rows.append(-logits.log_softmax(-1)[torch.arange(len(tokens)), tokens])
    return torch.stack(rows).mean(0).numpy()


def test_the_mean_over_positions_is_the_trainers_loss_on_any_number_of_ranks(work, tmp_path):
    said = quietly(program.main, words(work, tmp_path / "one.json"))
    assert f"{COUNT} samples: " in said
    one = json.loads((tmp_path / "one.json").read_text())
    logged = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in reversed(logged) if "val_loss" in line)
    for key in ("val_loss", "val_loss_null"):
        assert one[key] == pytest.approx(trained[key], abs=1e-6)
    assert trained["val_loss"] != pytest.approx(trained["val_loss_null"], abs=1e-6)
    assert np.mean(one["loss_by_position"]) == pytest.approx(one["val_loss"], abs=1e-12)
    expected = by_hand(work)
    np.testing.assert_allclose(one["loss_by_position"], expected, atol=1e-5)
    assert np.abs(np.roll(expected, 1) - one["loss_by_position"]).max() > 1e-3, "a shift by one position shows"
    run_ranks(program.main, 2, words(work, tmp_path / "two.json"))
    two = json.loads((tmp_path / "two.json").read_text())
    assert two == one, "the same bits on two ranks"
    quietly(program.main, words(work, tmp_path / "short.json", f"limit={COUNT - 1}"))
    short = json.loads((tmp_path / "short.json").read_text())
    assert short["val_loss"] != one["val_loss"], "one sample less shows"
    assert Image.open(tmp_path / "one.png").size == Image.open(tmp_path / "two.png").size


def test_what_does_not_go_together_is_refused(work, tmp_path):
    with pytest.raises(UserError, match=r"out: .*table must name a .json file"):
        program.main(words(work, tmp_path / "table"))
    with pytest.raises(UserError, match=r"checkpoint: .*absent does not exist"):
        program.main(words(work, tmp_path / "out.json", "checkpoint=absent"))
    other = write_tokens(tmp_path / "other", 4, 1)
    write_manifest(other, replace(read_manifest(other), tokenizer_sha256="ab" * 32))
    with pytest.raises(UserError, match=r"data: .*other was made with another tokenizer \(sha256 abababababab…\)"):
        program.main(words(work, tmp_path / "out.json", f"data={other}"))
    broken = tmp_path / "nan.pt"
    weights = store.read_weights(work / "run")
    weights["norm.weight"][3] = torch.nan
    torch.save(weights, broken)
    sizes = ["model={n_layer: 2, n_head: 2, dim: 32, multiple_of: 16}"]
    with pytest.raises(UserError, match="the loss of some tokens is NaN or infinite"):
        program.main(words(work, tmp_path / "out.json", f"checkpoint={broken}", *sizes))
    assert not list(tmp_path.glob("out.json")), "no half result"
