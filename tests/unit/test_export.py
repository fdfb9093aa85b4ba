"""llamagen export: what is written needs torch alone and computes what we do; the card says what was measured."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llamagen_dist import cli
from llamagen_dist.commands import export as command
from llamagen_dist.config import GPTConfigFile, dump
from llamagen_dist.config.section import build
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel.entries import replicated
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.sampling.load import load_tokenizer
from llamagen_dist.sampling.sampler import generate
from tests import checkpoints as store
from tests.runs.sampling_work import make_work

ALONE = """
import sys
for name in ("llamagen_dist", "tokenizer_training", "pydantic", "yaml"):
    sys.modules[name] = None  # an import of it fails
import torch
from safetensors.torch import load_file, save_file
from load import load
given, out = load_file("inputs.safetensors"), {}
if "tokens" in given:
    condition = given["labels"] if "labels" in given else (given["features"], given["present"].bool())
    gpt = load("model")
    out["logits"] = gpt(given["tokens"], condition).detach()
    out["greedy"] = gpt.generate(condition, cfg_scale=2.0, temperature=0)
if "codes" in given:
    vq = load("tokenizer")
    out["images"] = vq.decode(given["codes"])
    out["codes"] = vq.encode(out["images"].clamp(-1, 1))
save_file({k: v.contiguous() for k, v in out.items()}, "outputs.safetensors")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tokenizer's, a class-conditional and a text-conditional run, each finished, and an evaluation of the first."""
    folder = make_work(tmp_path_factory.mktemp("export"))
    text_run(folder)
    for run in ("gpt", "text", "tokenizer"):
        (folder / run / "summary.json").write_text(json.dumps({"images_seen": 256, "tokens_per_image": 16}))
    (folder / "samples").mkdir()
    record = {"checkpoint_sha256": store.identity(folder / "gpt"), "cfg_scale": 2.0, "top_k": 40}
    (folder / "samples" / "record.json").write_text(json.dumps(record))
    (folder / "scores.json").write_text(json.dumps(evaluation(folder)))
    return folder


def evaluation(folder: Path, **changes: Any) -> dict[str, Any]:
    """What eval.evaluate writes, with a set of the model and one of a baseline drawn beside it."""
    reference = {"path": str(folder / "images"), "n": 20, "sha256": "c0ffee"}
    sets = {
        "model": {"n": 25, "fid": 95.07, "kid_mean": 0.0455, "kid_std": 0.0026},
        "untrained": {"n": 25, "fid": 250.0},
    }
    about = {
        name: {"images": {"path": str(folder / "samples" / f"{name}.npz"), "n": 25}, "reference": reference}
        for name in sets
    }
    record = {"format": 1, "bias": "N=25: biased upward", "metrics": {}, "sets": about}
    return {"n": 25, "sets": sets, "record": record, "absent": {"inception_score": "no logits"}} | changes


def text_run(folder: Path) -> None:
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "dim": 32, "multiple_of": 16, "condition": "text"}
    sizes |= {"prefix_tokens": 6, "caption_dim": 24, "prefix_rotation": "identity", "qk_norm": True}
    model = GPT(GPTConfig(**sizes, vocab_size=64, image_tokens=16, num_classes=0)).initialize(3)
    torch.nn.init.normal_(model.output.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    for layer in model.layers:
        torch.nn.init.uniform_(layer.attention.q_norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(2))
    trained = {"kind": "gpt", "run_dir": "x", "model": sizes, "data": {"train": "gone", "validation": "gone"}}
    config = build(GPTConfigFile, trained | {"train": {"images": 256}}, "test")
    entries = [replicated("weights", name, tensor) for name, tensor in model.state_dict().items()]
    (folder / "text").mkdir()
    store.save(folder / "text", 1, entries, {"images_seen": 256}, Topology(), config_text=dump(config))


def export(run: Path, out: Path, *more: str) -> Path:
    cli.main(["export", str(run), "--out", str(out), *more])
    return out


def computed(out: Path, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the folder's own code computes in a process in which nothing of ours can be imported."""
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, out / "inputs.safetensors")
    subprocess.run([sys.executable, "-c", ALONE], cwd=out, check=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    return load_file(out / "outputs.safetensors")


def our_gpt(run: Path, config: Mapping[str, Any], group: str = "weights") -> GPT:
    known = {key: value for key, value in config.items() if key not in ("ffn_dim",)} | {"multiple_of": 16}
    model = GPT(GPTConfig(**known)).eval()
    model.load_state_dict(store.read_weights(run, group))
    return model


def front(out: Path) -> dict[str, Any]:
    _, matter, _ = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter)


def test_a_class_model_and_its_tokenizer_compute_the_same_without_us(work, tmp_path, capsys):
    out = export(work / "gpt", tmp_path / "out", "--weights", "model")
    assert "class-conditional GPT and tokenizer" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    model, vq = our_gpt(work / "gpt", config["model"]), load_tokenizer(work / "tokenizer").model
    draw = torch.Generator().manual_seed(0)
    given = {"tokens": torch.randint(64, (3, 16), generator=draw), "labels": torch.tensor([0, 3, 4])}
    codes = {"codes": torch.randint(64, (2, 4, 4), generator=draw)}
    theirs = computed(out, given | codes)
    logits = model(given["tokens"], given["labels"])
    assert (theirs["logits"] - logits).abs().max() < 1e-6
    assert torch.equal(theirs["greedy"], generate(model, given["labels"], cfg_scale=2.0, temperature=0))
    images = vq.decode(codes["codes"])
    assert torch.equal(theirs["images"], images)
    assert torch.equal(theirs["codes"], vq.encode(images.clamp(-1, 1)))
    # sabotage twin: one weight changed is seen
    weights = load_file(out / "model.safetensors")
    weights["layers.1.feed_forward.w2.weight"][0, 0] += 0.1
    save_file(weights, out / "model.safetensors")
    assert (computed(out, given)["logits"] - logits).abs().max() > 1e-5


def test_a_text_model_computes_the_same_without_us(work, tmp_path, capsys):
    out = export(work / "text", tmp_path / "out")
    assert "Without its tokenizer" in capsys.readouterr().out
    assert not (out / "tokenizer.safetensors").exists()
    model = our_gpt(work / "text", json.loads((out / "config.json").read_text())["model"])
    draw = torch.Generator().manual_seed(0)
    present = torch.arange(6) >= 6 - torch.tensor([6, 3, 1, 0])[:, None]
    features = torch.randn(4, 6, 24, generator=draw)
    tokens = torch.randint(64, (4, 16), generator=draw)
    theirs = computed(out, {"tokens": tokens, "features": features, "present": present})
    # fp32 logits up to 5, from q and k that were normalised by other operations
    assert (theirs["logits"] - model(tokens, (features, present))).abs().max() < 4e-6
    assert torch.equal(theirs["greedy"], generate(model, (features, present), cfg_scale=2.0, temperature=0))
    with torch.no_grad():
        model.layers[1].attention.wo.weight[0, 0] += 0.1
    assert (theirs["logits"] - model(tokens, (features, present))).abs().max() > 1e-5, (
        "twin: one weight changed is seen"
    )


def test_a_tokenizers_run_is_exported_as_one(work, tmp_path):
    out = export(work / "tokenizer", tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "load.py", "README.md", "tokenizer.py", "tokenizer.safetensors", "export.json")
    }
    codes = torch.arange(16).view(1, 4, 4)
    assert torch.equal(
        computed(out, {"codes": codes})["images"], load_tokenizer(work / "tokenizer").model.decode(codes)
    )


def test_the_shipped_code_is_short_and_names_nothing_of_ours(work, tmp_path):
    out = export(work / "gpt", tmp_path / "out")
    assert len((out / "load.py").read_text().splitlines()) <= 26
    for name in ("load.py", "model.py", "tokenizer.py"):
        assert "llamagen_dist" not in (out / name).read_text()


def test_the_average_is_the_default_where_the_run_kept_one(work, tmp_path, capsys):
    run = shutil.copytree(work / "gpt", tmp_path / "gpt")
    (folder,) = run.glob("checkpoints/*")
    config = build(
        GPTConfigFile, yaml.safe_load((folder / "config.yaml").read_text()) | {"ema": {"decay": 0.9}}, "test"
    )
    entries = [replicated(g, n, t) for g in ("weights", "ema") for n, t in store.read_weights(run, g).items()]
    store.save(run, 2, entries, {}, Topology(), config_text=dump(config))
    name = "layers.0.attention.wo.weight"
    chosen = load_file(export(run, tmp_path / "ema") / "model.safetensors")[name]
    assert "moving average (ema)" in capsys.readouterr().out
    assert torch.equal(chosen, store.read_weights(run, "ema")[name])
    chosen = load_file(export(run, tmp_path / "model", "--weights", "model") / "model.safetensors")[name]
    assert "trained weights" in capsys.readouterr().out
    assert torch.equal(chosen, store.read_weights(run, "weights")[name])


def test_the_card_has_what_was_measured_on_these_weights_and_nothing_else(work, tmp_path):
    out = export(work / "gpt", tmp_path / "out", "--evaluation", str(work / "scores.json"))
    (entry,) = front(out)["model-index"]
    (result,) = entry["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {"fid": 95.07, "kid_mean": 0.0455, "kid_std": 0.0026}, "the baseline's 250 is not the model's"
    about = result["metrics"][0]["args"]
    assert (about["images"], about["reference_images"], about["reference_sha256"]) == (25, 20, "c0ffee")
    assert about["cfg_scale"] == 2.0
    text = (out / "README.md").read_text()
    assert "&id" not in text, "no references in the front matter"
    assert "Absent from the evaluation: inception_score: no logits" in text
    record = json.loads((out / "evaluation.json").read_text())
    assert record["sets"]["model"]["fid"] == 95.07
    assert str(work) not in (out / "evaluation.json").read_text() + text, "folders of this machine stay here"
    pytest.importorskip("huggingface_hub")
    from huggingface_hub.repocard import ModelCard

    seen = ModelCard.load(out / "README.md").data.eval_results
    assert {(r.metric_type, r.metric_value) for r in seen} == set(values.items())


def test_an_evaluation_beside_the_run_is_taken_if_it_is_of_these_weights(work, tmp_path, capsys):
    shutil.copy(work / "scores.json", work / "evaluation.json")
    try:
        assert "model-index" in front(export(work / "gpt", tmp_path / "a"))
        assert "model-index" not in front(export(work / "text", tmp_path / "b")), "twin: other weights"
        assert "Nothing." in (tmp_path / "b" / "README.md").read_text()
        assert "drawn with other weights" in capsys.readouterr().out
    finally:
        (work / "evaluation.json").unlink()


def test_the_held_out_loss_of_this_checkpoint_is_on_the_card(work, tmp_path):
    lines = [{"images_seen": 128, "val_loss": 3.5}, {"images_seen": 256, "val_loss": 3.25}, {"images_seen": 256}]
    run = shutil.copytree(work / "text", tmp_path / "text")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (entry,) = front(export(run, tmp_path / "out"))["model-index"]
    assert [m["value"] for result in entry["results"] for m in result["metrics"]] == [3.25]


def test_the_same_again_writes_nothing_and_another_is_refused(work, tmp_path, capsys):
    out = export(work / "gpt", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    export(work / "gpt", out)
    assert "was exported before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match="already holds an exported model made in another way"):
        export(work / "text", out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_export_that_was_cut_off_is_written_again(work, tmp_path, monkeypatch):
    from llamagen_dist.hub import export as module

    monkeypatch.setattr(module, "sha256_file", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(work / "gpt", tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out" / "export.json").exists()
    assert (export(work / "text", tmp_path / "out") / "export.json").exists()
    assert not (tmp_path / "out" / "tokenizer.safetensors").exists(), "nothing of the other export is left"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gpt", "--out", "{tmp}/mine"], "holds notes.txt, which this command did not write"),
        (["gpt", "--out", "{tmp}/mine/notes.txt"], "--out"),
        (["gpt.safetensors", "--out", "{tmp}/out"], "is a bare weights file"),
        (["nowhere", "--out", "{tmp}/out"], "nowhere does not exist"),
        (["tokens", "--out", "{tmp}/out"], "no complete checkpoint there"),
        (["gpt", "--out", "{tmp}/out", "--tokenizer", "{work}/tokenizer2"], "is not the one whose tokens"),
        (["text", "--out", "{tmp}/out", "--tokenizer", "{work}/tokenizer65"], "has 65 codes"),
        (["text", "--out", "{tmp}/out", "--weights", "ema"], "holds no ema"),
        (["tokenizer", "--out", "{tmp}/out", "--weights", "ema"], "holds no ema"),
        (["tokenizer2", "--out", "{tmp}/out"], "tokenizer2 is not finished (no summary.json)"),
        (["text", "--out", "{tmp}/out", "--evaluation", "{work}/scores.json"], "has no score of these weights"),
        (["gpt", "--out", "{tmp}/out", "--evaluation", "{work}/sample.yaml"], "--evaluation"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(work, tmp_path, arguments, sentence):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear diary")
    run, *rest = [argument.format(tmp=tmp_path, work=work) for argument in arguments]
    with pytest.raises(UserError) as refusal:
        cli.main(["export", str(work / run), *rest])
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_damaged_weights_are_refused(work, tmp_path):
    run = shutil.copytree(work / "gpt", tmp_path / "gpt")
    victim = next(run.glob("checkpoints/*/weights-*"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match="no complete checkpoint"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match="damaged"):
        export(victim.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hub:
    """A hub's client that remembers what it was asked for."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.fault = fault

    def create_repo(self, repo: str, **options: Any) -> None:
        self.asked.append(repo)
        if self.fault:
            raise self.fault

    def upload_folder(self, folder_path: Path, **options: Any) -> str:
        self.asked.append(sorted(path.name for path in folder_path.iterdir()))
        return "somewhere"


def test_push_uploads_the_folder_and_a_dead_network_leaves_it_whole(work, tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(command, "open_hub", lambda repo: hub)
    out = export(work / "text", tmp_path / "out", "--push", "me/model")
    assert hub.asked[0] == "me/model"
    assert {"README.md", "model.safetensors", "export.json"} <= set(hub.asked[1])
    assert "pushed: somewhere" in capsys.readouterr().out
    monkeypatch.setattr(command, "open_hub", lambda repo: Hub(OSError("no route to host")))
    with pytest.raises(UserError, match=r"not reached or refused \(no route to host\).*is whole"):
        export(work / "text", out, "--push", "me/model")
    assert (out / "export.json").exists()


@pytest.mark.parametrize(
    ("repo", "sentence"), [("me/model", "nobody is logged in"), ("a/b/c", "not a repository's name")]
)
def test_push_is_refused_before_anything_is_written(work, tmp_path, monkeypatch, repo, sentence):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=sentence):
        export(work / "text", tmp_path / "out", "--push", repo)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'llamagen-dist\[hub\]'"):
        export(work / "text", tmp_path / "out", "--push", repo)
    assert not (tmp_path / "out").exists()
