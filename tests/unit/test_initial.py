"""init_from without a run: which rows go where, what is refused and why."""

import dataclasses

import pytest
import torch

from llamagen_dist.config import GPTConfigFile, dump
from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.sizes import TARGET_POSITIONS, GPTConfig
from llamagen_dist.parallel.entries import buffers, replicated
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.training.initial import class_rows, initial_weights
from tests import checkpoints as store

NAMES = ["cat", "crane", "dog", "crane"]
CLASS = GPTConfig(n_layer=2, n_head=2, dim=16, vocab_size=32, image_tokens=16, num_classes=4, multiple_of=16)
TEXT = dataclasses.replace(CLASS, condition="text", prefix_tokens=6, caption_dim=12)
MANIFEST = Manifest(
    kind="tokens",
    count=0,
    members=(".npy",),
    shards=(),
    classes=NAMES,
    grid=(4, 4),
    vocab_size=32,
    tokenizer_sha256="a" * 64,
)


def config(run_dir, **keys) -> GPTConfigFile:
    model = {"n_layer": 2, "n_head": keys.pop("n_head", 2), "dim": 16, "multiple_of": 16}
    return GPTConfigFile.model_validate(
        {
            "kind": "gpt",
            "run_dir": run_dir,
            "model": model,
            "data": {"train": "unused", "validation": "unused"},
            "train": {"images": 256},
            **keys,
        }
    )


def model_of(sizes: GPTConfig) -> GPT:
    torch.manual_seed(1)
    model = GPT(sizes)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


@pytest.fixture
def source(tmp_path):
    """A run on four classes, two of which share a name."""

    def make(sizes: GPTConfig = CLASS, names: list[str] | None = NAMES, sha256: str = "a" * 64):
        run = tmp_path / f"source-{sizes.condition}"
        model = model_of(sizes)
        found = [replicated("weights", n, p) for n, p in model.named_parameters()] + buffers("weights", model)
        state = {"images_seen": 640, "tokenizer": {"path": "t", "sha256": sha256}, "grid": [4, 4]}
        store.save(run, 1, found, state, Topology(), config_text=dump(config(run)), classes=names)
        return run

    return make


def start(run, sizes: GPTConfig = CLASS, manifest: Manifest = MANIFEST, **keys):
    return initial_weights(config(run.parent / "new", init_from=str(run), **keys), sizes, manifest, Topology())


def filled(initial, sizes: GPTConfig) -> GPT:
    model = GPT(sizes)
    model.load_state_dict({name: initial.tensor(name, t.shape) for name, t in model.state_dict().items()})
    return model


def test_rows_are_kept_by_name_and_equal_names_by_their_order():
    rows, told = class_rows(NAMES, 4, ["crane", "mouse", "cat", "crane", "crane"], 5, "x")
    assert rows == (1, 4, 0, 3, 4, 4), "the null row is 4 and stands in for a class that is new"
    assert "3 kept by name, 2 new (they start as the null class), 1 of the source left out" in told
    assert "  2 cat: was 0" in told
    assert "  1 mouse: new" in told
    rows, told = class_rows(NAMES, 4, NAMES, 4, "x")
    assert rows == (0, 1, 2, 3, 4)
    assert told == "; the same 4 classes"
    many = [str(n) for n in range(100)]
    rows, told = class_rows(many, 100, many[::-1], 100, "x")
    assert rows == (*range(99, -1, -1), 100)
    assert len(told.splitlines()) == 22
    assert "80 more" in told


def test_without_names_equal_counts_are_kept_by_number_and_others_refused():
    rows, told = class_rows(None, 4, NAMES, 4, "x")
    assert rows == (0, 1, 2, 3, 4)
    assert "kept by number" in told
    with pytest.raises(UserError, match=r"x has 5 classes, this run 4.*init_classes=FILE"):
        class_rows(None, 5, NAMES, 4, "x")


def test_the_new_model_has_the_old_weights_at_the_new_rows(source, capsys):
    run, old = source(), model_of(CLASS)
    names = ["dog", "mouse", "cat"]
    sizes = dataclasses.replace(CLASS, num_classes=3, image_tokens=36)
    manifest = dataclasses.replace(MANIFEST, classes=names, grid=(6, 6))
    initial = start(run, sizes, manifest)
    new = filled(initial, sizes)
    said = capsys.readouterr().out
    assert "from 4x4 to 6x6 tokens" in said
    assert "  0 dog: was 2" in said
    table, was = new.cls_embedding.embedding_table.weight, old.cls_embedding.embedding_table.weight
    assert torch.equal(table, was[[2, 4, 0, 4]])
    for name, p in new.named_parameters():
        if "embedding_table" not in name:
            assert torch.equal(p, old.get_parameter(name)), name
    assert initial.record["weights_sha256"] == store.identity(run)
    assert initial.record["class_rows"] == [2, 4, 0, 4]
    assert initial.record["images_seen"] == 640


def test_what_the_source_has_not_starts_neutral(source, capsys):
    """Released weights into a model with a table of target positions and a beta; the other way round they are named."""
    run, sizes = source(), dataclasses.replace(CLASS, order="rar", guidance="free")
    new = filled(start(run, sizes), sizes).eval()
    said = capsys.readouterr().out
    for name in (TARGET_POSITIONS, "beta_embedding.fc1.weight", "beta_embedding.fc2.weight"):
        assert f"{name} is new and starts neutral" in said
    assert new.beta_embedding.fc1.weight.std() > 0
    tokens, labels = torch.arange(32).view(2, 16), torch.tensor([0, 4])
    assert torch.equal(new(tokens, labels), model_of(CLASS).eval()(tokens, labels))
    new.target_positions.weight.data.fill_(0.1)
    assert not torch.equal(new(tokens, labels), model_of(CLASS).eval()(tokens, labels)), "sabotage twin"
    with pytest.raises(RuntimeError, match=TARGET_POSITIONS):
        GPT(sizes).load_state_dict(store.read_weights(run))
    torch.save(new.state_dict(), run.parent / "new.pt")
    with pytest.raises(UserError, match=r"beta_embedding.fc1.weight does not belong to this run's model"):
        start(run.parent / "new.pt")


@pytest.mark.parametrize("kind", ["run", "step", "safetensors", "pt"])
def test_every_kind_of_source_gives_the_same_model(source, kind, tmp_path):
    run = source()
    weights = store.read_weights(run)
    path = {"run": run, "step": store.newest(run)}.get(kind, tmp_path / f"weights.{kind}")
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    elif kind == "pt":
        torch.save({"model": {**weights, "freqs_cis": torch.zeros(3)}}, path)
    new = filled(start(path), CLASS)
    assert all(torch.equal(p, weights[name]) for name, p in new.named_parameters())


def test_half_precision_sources_become_fp32(source, tmp_path):
    weights = {name: t.bfloat16() for name, t in store.read_weights(source()).items()}
    torch.save(weights, tmp_path / "half.pt")
    new = filled(start(tmp_path / "half.pt"), CLASS)
    assert {p.dtype for p in new.parameters()} == {torch.float32}
    assert torch.equal(new.output.weight, weights["output.weight"].float())


def test_a_bare_file_takes_its_names_from_init_classes(source, tmp_path):
    run = source()
    torch.save(store.read_weights(run), tmp_path / "bare.pt")
    (tmp_path / "names.txt").write_text("cat\ncrane\ndog\ncrane\n\n")
    sizes, manifest = dataclasses.replace(CLASS, num_classes=1), dataclasses.replace(MANIFEST, classes=["dog"])
    initial = start(tmp_path / "bare.pt", sizes, manifest, init_classes=tmp_path / "names.txt")
    assert initial.rows == (2, 4)
    with pytest.raises(UserError, match=r"init_from: .*bare\.pt has 4 classes, this run 1"):
        start(tmp_path / "bare.pt", sizes, manifest)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"has 4 classes and init_classes=.* names 2"):
        start(tmp_path / "bare.pt", sizes, manifest, init_classes=tmp_path / "names.txt")


def test_text_stage_two_takes_all_of_stage_one(source):
    run, old = source(TEXT, None), model_of(TEXT)
    sizes = dataclasses.replace(TEXT, image_tokens=64)
    new = filled(start(run, sizes), sizes)
    assert torch.equal(new.cls_embedding.uncond_embedding, old.cls_embedding.uncond_embedding)
    assert torch.equal(new.cls_embedding.cap_proj.fc1.weight, old.cls_embedding.cap_proj.fc1.weight)


@pytest.mark.parametrize(
    ("sizes", "changes", "reason"),
    [
        (TEXT, {}, "is a class-conditional GPT and this run trains a text-conditional GPT"),
        (dataclasses.replace(CLASS, vocab_size=64), {}, "knows 32 codes and the token shards of data.train have 64"),
        (
            dataclasses.replace(CLASS, dim=32),
            {},
            r"embedding_table\.weight has shape \[5, 16\], and this run's model has \[5, 32\]",
        ),
        (dataclasses.replace(CLASS, n_layer=3), {}, r"layers\.2\.attention\.wqkv\.weight is missing"),
        (dataclasses.replace(CLASS, n_layer=1), {}, r"layers\.1\..* does not belong to this run's model"),
        (
            CLASS,
            {"tokenizer_sha256": "b" * 64},
            r"codes of another tokenizer \(sha256 aaaaaaaaaaaa…, .*bbbbbbbbbbbb…\)",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_reason(source, sizes, changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        start(source(), sizes, dataclasses.replace(MANIFEST, **changes))
    assert str(caught.value).startswith("init_from: ")
    assert len(str(caught.value).splitlines()) == 1


def test_an_option_that_adds_parameters_can_be_switched_on_but_not_off(source, capsys):
    run, old, sizes = source(), model_of(CLASS), dataclasses.replace(CLASS, qk_norm=True)
    new = filled(start(run, sizes), sizes)
    assert "the parameters of model.qk_norm are not there and start as in a fresh run" in capsys.readouterr().out
    added = {name for name, _ in new.named_parameters()} - {name for name, _ in old.named_parameters()}
    assert added == {f"layers.{n}.attention.{x}_norm.weight" for n in (0, 1) for x in "qk"}
    for name, p in new.named_parameters():
        assert torch.equal(p, torch.ones(8) if name in added else old.get_parameter(name)), name
    torch.save({"model": {n: t for n, t in new.state_dict().items() if "1.attention.q_" not in n}}, run / "gap.pt")
    with pytest.raises(UserError, match=r"layers\.1\.attention\.q_norm\.weight is missing"):
        start(run / "gap.pt", sizes)
    torch.save({"model": new.state_dict()}, run / "on.pt")
    with pytest.raises(UserError, match=r"layers\.0\.attention\.q_norm\.weight does not belong to this run's model"):
        start(run / "on.pt")


def test_other_heads_are_refused_though_all_shapes_agree(source):
    sizes = dataclasses.replace(CLASS, n_head=4)
    with pytest.raises(UserError, match=r"model\.n_head 2 and this run 4"):
        start(source(), sizes, n_head=4)


def test_a_text_model_does_not_start_a_class_run(source):
    with pytest.raises(UserError, match="is a text-conditional GPT and this run trains a class-conditional GPT"):
        start(source(TEXT, None))


def test_sources_that_are_missing_damaged_or_no_gpt_are_refused(source, tmp_path):
    run = source()
    with pytest.raises(UserError, match=r"init_from: .*nowhere: no such checkpoint"):
        start(tmp_path / "nowhere")
    torch.save({"quantize.embedding.weight": torch.zeros(2, 2), "encoder.x": torch.zeros(1)}, tmp_path / "vq.pt")
    with pytest.raises(UserError, match="is a tokenizer"):
        start(tmp_path / "vq.pt")
    victim = next(store.newest(run).glob("weights-*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"init_from: .*no complete checkpoint"):
        start(run)
    with pytest.raises(UserError, match=f"init_from: {victim}: damaged"):
        start(victim.parent)


def test_an_older_checkpoint_asks_the_manifest_of_its_token_shards(tmp_path):
    """state.json did not name the tokenizer then; where the shards are gone, nothing is known and nothing refused."""
    run, shards, model = tmp_path / "old", tmp_path / "shards", model_of(CLASS)
    shards.mkdir()
    write_manifest(shards, MANIFEST)
    settings = config(run, data={"train": str(shards), "validation": str(shards)})
    found = [replicated("weights", n, p) for n, p in model.named_parameters()]
    store.save(run, 1, found, {}, Topology(), config_text=dump(settings), classes=NAMES)
    other = dataclasses.replace(MANIFEST, tokenizer_sha256="b" * 64)
    with pytest.raises(UserError, match="codes of another tokenizer"):
        start(run, CLASS, other)
    (shards / "manifest.json").unlink()
    assert start(run, CLASS, other) is not None
