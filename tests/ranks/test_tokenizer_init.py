"""init_from of a tokenizer: a file of weights alone, as released ones are, goes on other data; what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerModelSection, load
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import start
from tests import checkpoints as store
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tests.ranks.test_tokenizer import lines, train
from tests.tokenizer_run import random_tokenizer
from tokenizer_training.initial import start_from

MODEL: dict[str, Any] = {
    "channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 32,
    "codebook_dim": 4}  # fmt: skip
BATCH = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml, released.pt (weights of another seed, under ``model``) and runs to start from."""
    folder = tmp_path_factory.mktemp("init")
    write_images(folder / "train", 16, 16)
    write_images(folder / "validation", 8, 16, seed=1)
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "kind": "tokenizer", "run_dir": str(folder / "unused"), "model": MODEL,
        "data": {"train": str(folder / "train"), "validation": str(folder / "validation"), "image_size": 16},
        "loss": {"perceptual": "none",
                 "discriminator": {"start_images": BATCH, "channels": 8, "layers": 2, "norm": "group", "weight": 0.1}},
        "train": {"images": 2 * BATCH, "global_batch": BATCH}, "optim": {"lr": 1e-4, "weight_decay": 0.0},
        "validation": {"batch": 4}, "log": {"every_steps": 1}}))  # fmt: skip
    for name, changes in {
        "own": {},
        "larger": {"codebook_size": 64},
        "plain": {"l2_norm": False},
        "ema": {"quantizer": "ema"},
        "deeper": {"res_blocks": 2},
    }.items():
        random_tokenizer(folder / name, MODEL | changes, seed=7, image_size=16)
    released = store.read_weights(store.newest(folder / "own"))
    released.pop("quantize.codebook_used")  # some released files lack it
    torch.save({"model": released}, folder / "released.pt")
    return folder


def first_loss(weights: dict[str, torch.Tensor], folder: Path) -> float:
    """The mean squared error that training's first step must see: of these weights, on the first batch's pictures."""
    model = build_vq(TokenizerModelSection(**MODEL))
    model.load_state_dict(weights, strict=False)
    images = to_floats(load_images(open_shards(folder / "validation"), range(8), 16))
    with torch.no_grad():
        return float(F.mse_loss(model(images)[0], images))


@pytest.mark.parametrize("source", ["released.pt", pytest.param("own", marks=pytest.mark.long)])
def test_a_run_begins_at_the_sources_weights_with_all_else_fresh(work, source, tmp_path):
    weights = store.read_weights(store.newest(work / "own"))
    config, run = work / "config.yaml", tmp_path / "run"
    # so small a rate that what is validated after it is still what was put in
    changes = ("optim.lr=1e-12", "loss.discriminator.warmup_images=8")
    said = train(2, config, run, f"init_from={work / source}", *changes)
    parameters = sum(tensor.numel() for name, tensor in weights.items() if name != "quantize.codebook_used")
    assert f"init_from: all {parameters:,} parameters of " in said
    assert (
        "fresh: optimizer, image count, code usage, discriminator (from image 8 of this run, alone for 8 images)"
        in said
    )
    steps = [line for line in lines(run) if "loss" in line]
    assert [line["images_seen"] for line in steps] == [BATCH, 2 * BATCH]
    assert ["discriminator" in line for line in steps] == [False, True], "start_images counts from this run's start"
    assert not any("adversarial" in line for line in steps), "and the discriminator, fresh as it is, learns alone first"
    validated = next(line["val_loss"] for line in lines(run) if "val_loss" in line)
    assert validated == pytest.approx(first_loss(weights, work), rel=1e-5)
    torch.manual_seed(0)
    fresh = build_vq(TokenizerModelSection(**MODEL)).state_dict()
    assert validated != pytest.approx(first_loss(fresh, work), rel=1e-2), "sabotage twin: without the weights"
    state = json.loads((store.newest(run) / "state.json").read_text())
    assert state["init_from"] == json.loads((run / "record.json").read_text())["init_from"]
    assert state["init_from"]["path"] == str(work / source)
    assert ("images_seen" in state["init_from"]) == (source == "own")
    assert state["task"] == {"optimizer.step": 2.0, "discriminator_optimizer.step": 1.0}


@pytest.mark.long
def test_a_resume_takes_its_own_checkpoint_and_not_the_source(work, tmp_path):
    run, settings = tmp_path / "run", ("optim.lr=1e-2", "train.images=8")
    train(1, work / "config.yaml", run, f"init_from={work / 'released.pt'}", *settings)
    middle = store.read_weights(store.newest(run))
    moved = work / "moved.pt"
    (work / "released.pt").rename(moved)  # no longer needed
    try:
        said = train(1, work / "config.yaml", run, f"init_from={work / 'released.pt'}", "optim.lr=1e-2")
    finally:
        moved.rename(work / "released.pt")
    assert "init_from: all" not in said
    assert "resumed from" in said
    assert "init_from" in json.loads((store.newest(run) / "state.json").read_text())
    assert not torch.equal(middle["quant_conv.bias"], store.read_weights(store.newest(run))["quant_conv.bias"])


REFUSALS = {
    "larger": ([], "has 64 codes of 4 numbers, and this run 32 of 4; set model.codebook_size=64"),
    "plain": ([], "compares its codes as they are; set model.l2_norm=false"),
    "own": (["model.l2_norm=false"], "compares its codes normalised; set model.l2_norm=true"),
    "ema": ([], "was trained with the quantizer ema"),
    "released.pt": (["model.quantizer=fsq", "model.levels=[8,4]", "model.codebook_dim=8"], "model.quantizer says fsq"),
    "deeper": ([], "make model.* the source's own sizes"),
    "gpt.pt": ([], "gpt.pt is a GPT; give a tokenizer's run directory"),
    "absent": ([], "no such checkpoint"),
}


def refused(folder: Path) -> dict[str, tuple[str, bool]]:
    """The sentence for every source, and whether the model is still as it was."""
    topology, said = start(), {}
    for source, (settings, _) in REFUSALS.items():
        config = load(folder / "config.yaml", [f"init_from={folder / source}", *settings], kind="tokenizer")
        model = build_vq(config.model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            start_from(model, config, topology)
            said[source] = "", True
        except UserError as error:
            same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            said[source] = str(error), same
    return said


def test_sources_that_do_not_fit_are_refused_by_what_differs(work):
    torch.save({"tok_embeddings.weight": torch.zeros(2, 2), "output.weight": torch.zeros(2, 2)}, work / "gpt.pt")
    for said in run_ranks(refused, 2, work):
        for source, (_, sentence) in REFUSALS.items():
            message, same = said[source]
            assert sentence in message
            assert message.startswith("init_from: ")
            assert "\n" not in message
            assert same


def test_a_codebook_that_would_be_replaced_at_once_is_refused(work):
    with pytest.raises(UserError, match=r"init_from: brings its codes along, which model\.codebook_init would replace"):
        load(work / "config.yaml", ["init_from=x", "model.codebook_init=first_batch"], kind="tokenizer")
