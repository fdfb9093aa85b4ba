"""The checkpoint store alone: commit order, damage, refusal of other models, LlamaGen's containers."""

import argparse
import fractions
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from llamagen_dist.checkpoint import llamagen, plan
from llamagen_dist.errors import UserError
from llamagen_dist.files import sha256_file
from llamagen_dist.parallel.entries import TensorEntry, replicated
from llamagen_dist.parallel.topology import Topology
from tests import checkpoints as store

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


def sign_again(folder) -> None:
    """What a checkpoint looks like whose writer went wrong: all hashes agree, the content does not."""
    index = json.loads((folder / "index.json").read_text())
    index["files"] = {name: sha256_file(folder / name) for name in index["files"]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "COMPLETE").write_text(sha256_file(folder / "index.json"))


def damage_it(folder, damage: str):
    """Returns the file that the message must name; "nothing" is the twin that must pass."""
    victim = next(folder.glob("optimizer-*.safetensors"))
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif damage == "cut":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "remove":
        victim.unlink()
    elif damage == "header":
        content = victim.read_bytes()
        victim.write_bytes(content[:8] + b"[" + content[9:])
        sign_again(folder)
    elif damage == "tensor":
        save_file({"other": torch.zeros(2)}, victim)
        sign_again(folder)
    elif damage in ("index", "index cut", "index gone"):
        victim = folder / "index.json"
        text = victim.read_text()
        if damage == "index gone":
            victim.unlink()
        else:
            victim.write_text(text[:-9] if damage == "index cut" else text.replace("a.weight", "c.weight"))
    elif damage == "index no json":
        victim = folder / "index.json"
        victim.write_text(victim.read_text()[:-9])
        (folder / "COMPLETE").write_text(sha256_file(victim))
    elif damage == "state":
        victim = folder / "state.json"
        victim.write_text(victim.read_text().replace("8", "9"))
    elif damage == "complete":
        (folder / "COMPLETE").write_bytes(b"\xff\xfe")
        victim = folder / "index.json"
    return victim


@pytest.mark.parametrize(
    "damage",
    [
        "flip",
        "cut",
        "remove",
        "header",
        "tensor",
        "index",
        "index cut",
        "index gone",
        "index no json",
        "state",
        "complete",
        "nothing",
    ],
)
def test_damage_is_named_and_the_older_one_used(tmp_path, damage, capsys):
    save(tmp_path, 1, entries(1))
    newest = save(tmp_path, 2, entries(2))
    victim = damage_it(newest, damage)
    if damage == "nothing":
        assert store.newest(tmp_path) == newest, "an undamaged one passes: the check is not always 'damaged'"
        return
    assert store.newest(tmp_path).name == "step_00000001"
    said = capsys.readouterr().out
    assert str(victim) in said
    assert len(said.splitlines()) == 1
    if damage in ("flip", "cut", "state"):
        recorded = json.loads((newest / "index.json").read_text())["files"][victim.name]
        assert f"damaged (sha256 {sha256_file(victim)}, written as {recorded})" in said


def test_another_shape_than_the_models_is_refused_with_the_file(tmp_path):
    folder = save(tmp_path, 1, entries(1))
    victim = next(folder.glob("weights-*.safetensors"))
    save_file({"a.weight": torch.zeros(4, 8), "b.weight": torch.zeros(3)}, victim)
    sign_again(folder)
    assert store.newest(tmp_path) == folder, "nothing in the checkpoint itself tells"
    with pytest.raises(UserError, match=rf"{victim}: a\.weight has shape \(4, 8\), the model wants \(8, 4\)"):
        store.restore(folder, entries(1))


def test_the_moving_average_is_a_group_of_its_own(tmp_path):
    weights, average = torch.ones(3), torch.zeros(3)
    found = [replicated("weights", "w", weights), replicated("weights", "buffer", torch.arange(2))]
    plain = save(tmp_path / "plain", 1, found)
    with_average = save(tmp_path / "average", 1, [*found, replicated("ema", "w", average)])
    assert store.read_weights(with_average, "ema")["w"].tolist() == [0, 0, 0]
    assert store.read_weights(with_average, "ema")["buffer"].tolist() == [0, 1], "a buffer has no average"
    assert store.read_weights(with_average)["w"].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"holds no ema, only weights; it was trained without \(ema\.decay: 0\)"):
        store.read_weights(plain, "ema")
    torch.save({"w": weights}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt: one file of weights has no ema"):
        store.read_weights(tmp_path / "w.pt", "ema")


def test_the_plan_bounds_what_a_rank_stages_and_shares_the_bytes_out():
    generator = torch.Generator().manual_seed(3)
    sizes = [*torch.randint(0, 4000, (200,), generator=generator).tolist(), 9000]
    types = (torch.float32, torch.int64, torch.bool, torch.bfloat16)
    found = [
        TensorEntry(("weights", "optimizer")[n % 2], str(n), (size,), lambda: None, lambda t: None, types[n % 4])
        for n, size in enumerate(sizes)
    ]
    total = sum(plan.size_of(entry) for entry in found)
    for world in (1, 3, 8):
        laid = plan.make_plan(found, world, limit=20000)
        for rank in range(world):
            files = [file for part in laid.rounds for file in part.files[rank]]
            for file in files:
                header = json.loads(file.header()[8:])
                begins = [(header[entry.key]["data_offsets"][0], entry.dtype.itemsize) for _, entry in file.members]
                assert all(begin % itemsize == 0 for begin, itemsize in begins)
            assert abs(sum(file.size for file in files) - total / world) < 40000, "shared equally"
            single = 9000 * types[200 % 4].itemsize
            assert max(part.staged(rank) for part in laid.rounds) <= max(20000, single)
        assert sorted(laid.where()) == sorted(f"{e.group}:{e.key}" for e in found)
        assert (laid.rounds[0].first, laid.rounds[-1].last) == (0, len(found))
        assert len({name for rank in range(world) for name in laid.file_names(rank)}) == len(set(laid.where().values()))


def test_without_complete_it_does_not_exist(tmp_path):
    folder = save(tmp_path, 1, entries())
    (folder / "COMPLETE").unlink()
    assert store.newest(tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        store.read_weights(tmp_path)


def test_a_tensor_that_cannot_be_read_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, 1, entries(1))

    def gone():
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


# --- files that came from elsewhere ---


def written(folder, form: str, content: dict):
    """A weights file in one of the three formats that are read."""
    path = folder / f"w.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        save_file(content, path)
    else:
        torch.save({"model": content}, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_by_its_download_is_one_sentence_with_the_cause(tmp_path, form):
    path = written(tmp_path, form, {f"layers.{n}.w": torch.randn(20, 7) for n in range(4)})
    whole = path.read_bytes()
    assert llamagen.read(path).keys() == {f"layers.{n}.w" for n in range(4)}, "the whole file is read"
    for length in (*range(0, len(whole), 41), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            store.read_weights(path)
        assert str(caught.value) == (
            f"{path}: the file ends too early ({length:,} bytes), most likely because its download or copy was "
            "interrupted; fetch it again"
        )


def test_a_whole_file_with_other_bytes_is_not_called_cut(tmp_path):
    """The twin: the cause is looked for, not assumed."""
    path = written(tmp_path, "zip", {"w": torch.ones(3)})
    content = bytearray(path.read_bytes())
    content[40:200] = bytes(160)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a file of weights"):
        llamagen.read(path)


@pytest.mark.parametrize(
    ("prefixes", "named"),
    [
        (("_orig_mod.", ""), "`_orig_mod.`"),
        (("module.", ""), "`module.`"),
        (("model.", ""), "`model.`"),
        (("module._orig_mod.model.", ""), "`_orig_mod.`, `model.`, `module.`"),
        (("_fsdp_wrapped_module.", "_fsdp_wrapped_module."), "`_fsdp_wrapped_module.`"),
        (
            ("module.", "_orig_mod._checkpoint_wrapped_module."),
            "`_checkpoint_wrapped_module.`, `_orig_mod.`, `module.`",
        ),
        (("", "_orig_mod."), "`_orig_mod.`"),
    ],
)
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_wrappers_prefixes_are_left_out_and_named(tmp_path, capsys, prefixes, named, form):
    front, inside = prefixes
    content = {
        f"{front}layers.0.{inside}attention.wqkv.weight": torch.ones(2),
        f"{front}norm.weight": torch.zeros(2),
        "freqs_cis": torch.zeros(1),
    }
    path = written(tmp_path, form, content)
    assert store.read_weights(path).keys() == {"layers.0.attention.wqkv.weight", "norm.weight"}
    assert capsys.readouterr().out == f"{path}: its tensors' names carry {named}, which was left out\n"


def test_without_a_prefix_nothing_is_said_and_two_names_for_one_tensor_are_refused(tmp_path, capsys):
    assert store.read_weights(written(tmp_path, "zip", {"norm.weight": torch.ones(2)})).keys() == {"norm.weight"}
    assert capsys.readouterr().out == ""
    both = {"norm.weight": torch.ones(2), "module.norm.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"w\.pt: holds both norm\.weight and module\.norm\.weight"):
        store.read_weights(written(tmp_path, "zip", both))


def test_of_a_file_with_an_average_it_is_said_which_was_taken_and_the_other_can_be_chosen(tmp_path, capsys):
    path = tmp_path / "train.pt"
    torch.save({"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}, "steps": 5}, path)
    taken = {group: store.read_weights(path, group)["w"].tolist() for group in (None, "ema", "weights")}
    assert taken == {None: [1, 1], "ema": [1, 1], "weights": [0, 0]}
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{path}: took `ema` and not `model`, which the file also holds",
        f"{path}: took `ema` and not `model`, which the file also holds",
        f"{path}: took `model` and not `ema`, which the file also holds",
    ]
    torch.save({"ema": {"w": torch.ones(2)}}, path)
    with pytest.raises(UserError, match=r"train\.pt: holds nothing but an average"):
        store.read_weights(path, "weights")
