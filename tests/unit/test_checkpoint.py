"""The checkpoint store alone: commit order, damage, refusal of other models, LlamaGen's containers."""

import argparse
import fractions
import json
import os

import pytest
import torch

from llamagen_dist.checkpoint import llamagen, plan, store
from llamagen_dist.checkpoint.entries import replicated
from llamagen_dist.config import UserError
from llamagen_dist.parallel.topology import Topology

ALONE = Topology()


def entries(seed: int = 0, size: int = 8) -> list:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a.weight": torch.randn(size, 4, generator=generator),
        "b.weight": torch.randn(3, generator=generator),
    }
    found = [replicated("weights", name, t) for name, t in tensors.items()]
    return found + [replicated("optimizer", f"exp_avg/{name}", t * 2) for name, t in tensors.items()]


def values(found: list) -> dict[str, torch.Tensor]:
    return {f"{e.group}:{e.key}": e.read(0).clone() for e in found}


def save(run, step, found, **options):
    return store.save(
        run, step, found, {"images_seen": step * 4, "step": step}, ALONE, config_text="kind: gpt\n", **options
    )


def test_round_trip_and_pruning(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, entries(step), classes=["a", "ä"], keep_last=2)
    assert [f.name for f in store.complete(tmp_path)] == ["step_00000002", "step_00000003"]
    other = entries(9)
    store.restore(store.newest(tmp_path), other)
    want, got = values(entries(3)), values(other)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert store.read_state(store.newest(tmp_path))["images_seen"] == 12
    assert torch.equal(store.read_weights(tmp_path)["b.weight"], want["weights:b.weight"])
    assert json.loads((store.newest(tmp_path) / "classes.json").read_text()) == ["a", "ä"]


def test_files_stay_small_and_the_identity_does_not_depend_on_them(tmp_path, monkeypatch):
    whole = save(tmp_path / "whole", 1, entries(1))
    monkeypatch.setattr(plan, "SHARD_BYTES", 16)
    parts = save(tmp_path / "parts", 1, entries(1))
    assert len(list(parts.glob("*.safetensors"))) == 4 > len(list(whole.glob("*.safetensors")))
    assert store.identity(tmp_path / "whole") == store.identity(parts)
    assert store.identity(save(tmp_path / "other", 1, entries(2))) != store.identity(parts)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "index", "nothing"])
def test_damage_is_named_and_the_older_one_used(tmp_path, damage, capsys):
    save(tmp_path, 1, entries(1))
    newest = save(tmp_path, 2, entries(2))
    victim = next(newest.glob("optimizer-*.safetensors"))
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif damage == "cut":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "remove":
        victim.unlink()
    elif damage == "index":
        victim = newest / "index.json"
        victim.write_text(victim.read_text().replace("a.weight", "c.weight"))
    if damage == "nothing":
        assert store.newest(tmp_path).name == "step_00000002", (
            "an undamaged one passes: the check is not always 'damaged'"
        )
        return
    assert store.newest(tmp_path).name == "step_00000001"
    assert str(victim) in capsys.readouterr().out


def test_without_complete_it_does_not_exist(tmp_path):
    folder = save(tmp_path, 1, entries())
    (folder / "COMPLETE").unlink()
    assert store.newest(tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        store.read_weights(tmp_path)


def test_a_tensor_that_cannot_be_read_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 1, entries(1))

    def gone(writer):
        raise RuntimeError("Connection closed by peer")

    broken = entries(2)
    broken[-1] = type(broken[-1])("optimizer", "x", (1,), gone, lambda t: None)
    with pytest.raises(RuntimeError, match="closed"):
        save(tmp_path, 2, broken, keep_last=1)
    assert store.newest(tmp_path).name == "step_00000001"
    save(tmp_path, 3, entries(2), keep_last=1)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_another_model_is_refused_with_the_key(tmp_path):
    folder = save(tmp_path, 1, entries())
    with pytest.raises(UserError, match=r"a\.weight has shape \(8, 4\), the model wants \(6, 4\)"):
        store.restore(folder, entries(size=6))
    with pytest.raises(UserError, match=r"holds no weights tensor c\.weight"):
        store.restore(folder, [replicated("weights", "c.weight", torch.zeros(1))])


@pytest.mark.parametrize("container", [None, "model", "module", "state_dict", "ema"])
def test_llamagen_containers_are_unwrapped(tmp_path, container):
    state = {"norm.weight": torch.ones(3), "freqs_cis": torch.zeros(2)}
    content = state if container is None else {container: state, "steps": 5}
    if container == "ema":
        content["model"] = {"norm.weight": torch.zeros(3)}
    torch.save(content, tmp_path / "w.pt")
    assert llamagen.read(tmp_path / "w.pt").keys() == {"norm.weight"}
    assert store.read_weights(tmp_path / "w.pt")["norm.weight"].tolist() == [1, 1, 1]


def test_llamagens_training_checkpoints_are_read_with_their_arguments(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1e-4), "steps": 5}, tmp_path / "train.pt")
    assert llamagen.read(tmp_path / "train.pt").keys() == {"w"}


def test_files_that_are_no_weights_are_one_sentence(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"steps": 5}, tmp_path / "empty.pt")
    torch.save(
        {"model": {"w": torch.ones(1)}, "args": fractions.Fraction(1, 2)},
        tmp_path / "pickle.pt",
    )
    (tmp_path / "bad.safetensors").write_bytes(b"123")
    for name in ("text.pt", "empty.pt", "pickle.pt", "bad.safetensors", "missing.pt"):
        with pytest.raises(UserError) as caught:
            store.read_weights(tmp_path / name)
        assert name in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
