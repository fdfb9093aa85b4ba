"""Text-conditional training from shards with captions: layouts agree, resumes are exact, misfits are refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import deepspeed  # noqa: F401 - before the fork, so that ranks start at once
import pytest
import torch
import yaml

from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenStream
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.initial import null_caption
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.train_gpt import main
from llamagen_dist.training.gpt_task import training_condition
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.runs.caption_shards import DIM, PLACES, write_captions
from tests.runs.token_shards import VOCABULARY, write_tokens

IMAGES, BATCH, HALF = 512, 16, 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_captions(folder / "train", 200, 0)
    write_captions(folder / "validation", 40, 1)
    config = {
        "kind": "gpt",
        "run_dir": str(folder / "unused"),
        "data": {
            "train": str(folder / "train"),
            "validation": str(folder / "validation"),
            "short_captions": 0.3,
        },
        "model": {
            "n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 16,
            "condition": "text", "prefix_tokens": PLACES, "caption_dim": DIM, "class_dropout_p": 0.2,
        },
        "train": {"images": IMAGES, "global_batch": BATCH, "seed": 7},
        "optim": {"lr": 0.01},
        "parallel": {"zero": 0},
        "validation": {},
        "checkpoint": {"every_images": HALF // 2, "keep_last": 5, "background": False},
        "log": {"every_steps": 1},
    }  # fmt: skip
    (folder / "gpt.yaml").write_text(yaml.safe_dump(config))
    return folder


def train(folder: Path, name: str, ranks: int, *words: str) -> list[dict]:
    """The lines of metrics.jsonl."""
    run_ranks(main, ranks, [str(folder / "gpt.yaml"), f"run_dir={folder / name}", *words])
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def cut_back(run: Path) -> None:
    """As if the run had been killed after its first checkpoint."""
    for checkpoint in sorted((run / "checkpoints").glob("step_*"))[1:]:
        os.remove(checkpoint / "COMPLETE")


@pytest.fixture(scope="module")
def alone(folder) -> list[dict]:
    return train(folder, "alone", 1)


@pytest.mark.long
def test_captions_are_learnt_and_layouts_agree(folder, alone):
    last = [line for line in alone if "val_loss" in line][-1]
    assert last["val_loss"] < last["val_loss_null"] - 0.03  # the first word says how the rows run
    expected = torch.tensor(losses(alone))
    for name, ranks, words in (
        ("zero1", 2, ("parallel.zero=1",)),
        ("tp2", 2, ("parallel.zero=2", "parallel.tensor=2")),
    ):
        found = torch.tensor(losses(train(folder, name, ranks, *words)))
        assert (found - expected).abs().max() < 1e-5
    longer = torch.tensor(losses(train(folder, "only-long", 1, "data.short_captions=0")))  # sabotage twin
    assert (longer - expected).abs().max() > 1e-3


@pytest.mark.long
def test_a_resume_goes_on_with_the_same_captions_and_the_null_caption_of_its_checkpoint(folder, alone):
    train(folder, "resumed", 1)
    cut_back(folder / "resumed")
    lines = train(folder, "resumed", 2, "parallel.zero=1")
    found = torch.tensor(losses(lines))
    assert len(found) == IMAGES // BATCH
    assert (found - torch.tensor(losses(alone))).abs().max() < 1e-5

    # a run that starts from these weights has another seed, and keeps the null caption that they were trained with
    started = f"init_from={folder / 'alone'}"
    train(folder, "started", 1, started, "train.seed=8", f"train.images={HALF}")
    name = "cls_embedding.uncond_embedding"
    kept, source = (store.read_weights(folder / run)[name] for run in ("started", "alone"))
    assert torch.equal(kept, source)
    sizes = GPTConfig(2, 2, 32, condition="text", prefix_tokens=PLACES, caption_dim=DIM)
    assert not torch.equal(kept, null_caption(sizes, 8))
    state = store.read_state(store.newest(folder / "started", warn=False))
    assert state["captions"]["encoder_sha256"] == "1" * 64
    whole = losses(train(folder, "started", 1, started, "train.seed=8", f"train.images={HALF}"))
    cut_back(folder / "started")
    again = losses(train(folder, "started", 1, started, "train.seed=8", f"train.images={HALF}"))
    assert again == whole
    for null, shown in ((kept, True), (null_caption(sizes, 8), False)):  # the second is the sabotage twin
        stream = TokenStream(open_shards(folder / "train"), Topology(), BATCH, 8, 0.2, (PLACES, DIM), 0.3)
        batch = stream.batch(0)
        model = GPT(replace(sizes, vocab_size=VOCABULARY, image_tokens=16, multiple_of=16)).train()
        model.load_state_dict(store.read_weights(folder / "alone"))
        model.dropout_seed = 8
        model.cls_embedding.uncond_embedding = null
        loss = model.loss(batch.tokens, training_condition(model, batch), batch.positions).item()
        assert (abs(loss - whole[0]) < 1e-5) == shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.caption_dim=16",), "model.caption_dim: is 16, but .* set it to 8"),
        (("model.prefix_tokens=4",), "model.prefix_tokens: is 4, but .* set it to 6"),
        (("data.train={classes}", "data.validation={classes}"), "holds no caption features, and a text-conditional"),
        (("data.validation={other}",), "encoded by another text encoder"),
        (("model.condition=class", "model.prefix_tokens=null"), "model.condition: class needs labels"),
    ],
    ids=["width", "places", "no captions", "two encoders", "no classes"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(folder, tmp_path, words, message):
    if not (folder / "classes").exists():
        write_tokens(folder / "classes", 40, 0)
        write_captions(folder / "other", 40, 0, "2" * 64)
    said = [word.format(classes=folder / "classes", other=folder / "other") for word in words]
    with pytest.raises(UserError, match=message):
        main([str(folder / "gpt.yaml"), f"run_dir={tmp_path / 'run'}", *said])
    assert not (tmp_path / "run").exists()
