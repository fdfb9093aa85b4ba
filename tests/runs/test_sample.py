"""eval.sample: the same bytes on any number of ranks and after any cut."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval.sample as program
from llamagen_dist import cli
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.models.vq import to_uint8
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.sampling import batch, pictures
from llamagen_dist.sampling.pictures import code_counts
from llamagen_dist.sampling.sampler import generate
from llamagen_dist.sampling.stages import Stages
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import BATCH, COUNT, SIZE, SIZES, contents, make_work, quietly, read_tokenizer, words
from tests.runs.token_shards import CLASSES, VOCABULARY

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def alone(work):
    quietly(program.main, words(work, work / "alone"))
    return work / "alone"


def test_the_files_are_what_evaluation_reads(work, alone):
    assert sorted(contents(alone)) == ["grid.png", "model.npz", "unigram.npz", "untrained.npz"]
    loaded = {name: np.load(alone / f"{name}.npz", allow_pickle=False) for name in ("model", "untrained", "unigram")}
    for file in loaded.values():
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (COUNT, SIZE, SIZE, 3))
        assert (file["labels"].dtype, file["labels"].tolist()) == (np.int64, [i % CLASSES for i in range(COUNT)])
    assert not np.array_equal(loaded["model"]["arr_0"], loaded["untrained"]["arr_0"])
    assert not np.array_equal(loaded["unigram"]["arr_0"], loaded["untrained"]["arr_0"])
    record = json.loads((alone / "record.json").read_text())
    wanted = {"cfg_scale": 2.0, "cfg_interval": -1, "temperature": 1.0, "top_k": 40, "top_p": 1.0, "seed": 0}
    assert {key: record[key] for key in wanted} == wanted
    assert (record["n"], record["batch"], record["image_size"]) == (COUNT, BATCH, SIZE)
    assert record["checkpoint_sha256"] == store.identity(work / "gpt")
    assert record["tokenizer_sha256"] == store.identity(work / "tokenizer")
    assert "head is zero" in record["meaning"]["untrained"]
    assert Image.open(alone / "grid.png").height > CLASSES * 72


def test_the_pictures_are_the_models_own(work, alone):
    model = GPT(GPTConfig(**SIZES, vocab_size=VOCABULARY, image_tokens=16, num_classes=CLASSES)).eval()
    model.load_state_dict(store.read_weights(work / "gpt"))
    tokenizer = read_tokenizer(work)
    numbers = torch.arange(COUNT)
    codes = generate(model, numbers % CLASSES, cfg_scale=2.0, top_k=40, seeds=numbers)
    expected = to_uint8(tokenizer.decode(codes.view(-1, 4, 4))).permute(0, 2, 3, 1).numpy()
    found = np.load(alone / "model.npz")["arr_0"]
    assert (np.abs(found.astype(int) - expected) <= 1).mean() > 0.999  # the batch shape may move a rounding
    assert (np.abs(found.astype(int) - np.roll(expected, 1, axis=0)) <= 1).mean() < 0.5


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(work, alone, tmp_path, ranks):
    run_ranks(program.main, ranks, words(work, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(alone)


@pytest.mark.long
def test_ranks_that_share_a_model_and_windows_change_no_picture(work, alone, tmp_path):
    run_ranks(program.main, 4, words(work, tmp_path / "out", "tensor=2", "window=4"))
    assert contents(tmp_path / "out") == contents(alone)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [record[key] for key in ("tensor", "window", "guidance", "ranks")] == [2, 4, "constant", 4]


def test_bf16_draws_other_pictures_and_says_so(work, alone, tmp_path):
    quietly(program.main, words(work, tmp_path / "out", "sets=[model]", "precision=bf16"))
    assert json.loads((tmp_path / "out" / "record.json").read_text())["precision"] == "bf16"
    assert contents(tmp_path / "out")["model.npz"] != contents(alone)["model.npz"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["guidance=cosine"], "guidance: "),
        (["cfg_scale=-1"], "cfg_scale: "),
        (["top_p=1.5"], "top_p: "),
        (["guidance=linear", "cfg_interval=3"], "cfg_interval: 3 belongs to guidance: constant, not to linear"),
        (["window=0"], "window: "),
        (["quantize=int4"], "quantize: "),
        (["batch=some"], "batch: give a whole number above 0, or auto (given: 'some')"),
        (["batch=0"], "batch: give a whole number above 0, or auto (given: 0)"),
        (["compile=true", "tensor=2"], "compile: ranks that share a GPT (tensor) communicate within a step"),
    ],
)
def test_a_drawing_that_makes_no_sense_is_refused(work, tmp_path, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        program.main(words(work, tmp_path / "out", *settings))
    assert not (tmp_path / "out").exists()


def test_a_model_that_its_ranks_cannot_share_is_refused(work, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "start", lambda tensor, threads: Topology())
    with pytest.raises(UserError, match=r"tensor: .*heads 2"):
        program.main(words(work, tmp_path / "out", "tensor=4"))
    assert not (tmp_path / "out").exists()


def test_more_pictures_begin_with_the_same_ones(work, alone, tmp_path):
    quietly(program.main, words(work, tmp_path / "out", "images=31", "sets=[model]"))
    more = np.load(tmp_path / "out" / "model.npz")["arr_0"]
    assert np.array_equal(more[:COUNT], np.load(alone / "model.npz")["arr_0"])


@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "cfg_scale=3",
        "temperature=0.9",
        "top_k=3",
        "cfg_interval=2",
        "weights=ema",
        "guidance=linear",
        "quantize=int8",
    ],
)
def test_every_option_reaches_the_pictures(work, alone, tmp_path, setting):
    """Sabotage twin of the equalities: the comparison sees one changed number."""
    quietly(program.main, words(work, tmp_path / "out", "sets=[model]", setting))
    assert contents(tmp_path / "out")["model.npz"] != contents(alone)["model.npz"]


SLOWLY = """
import runpy, sys, time
import llamagen_dist.sampling.pictures as pictures
decode = pictures.decoded
def slow(*arguments):
    time.sleep(0.15)
    return decode(*arguments)
pictures.decoded = slow
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def test_killed_and_resumed_by_two_ranks(work, alone, tmp_path):
    """A real process; SIGKILL after some chunks; a finished chunk that is damaged since is made again."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOWLY, "eval.sample", *words(work, out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len(list(out.glob(".parts/model-*.npz"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.glob(".parts/model-*.npz")}
    assert 3 <= len(done) <= 4
    assert not (out / "record.json").exists()
    torn = sorted(done)[1]
    torn.write_bytes(torn.read_bytes()[:-200] + b"\0" * 200)
    before = {path: path.read_bytes() for path in done if path != torn}

    with pytest.raises(UserError, match=r"holds unfinished results made in another way \(seed: 0 -> 1\)"):
        quietly(program.main, words(work, out, "seed=1"))
    assert {path: path.read_bytes() for path in before} == before
    run_ranks(program.main, 2, words(work, out))
    assert contents(out) == contents(alone)


def test_cut_off_while_the_results_were_being_written(work, alone, tmp_path, monkeypatch):
    def fails(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(program, "save", fails)
        with pytest.raises(OSError, match="No space"):
            quietly(program.main, words(work, tmp_path / "out"))
    assert (tmp_path / "out" / "model.npz").exists()
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/.parts/*.npz")}
    assert len(stamps) == 12
    assert "0/0" in quietly(program.main, words(work, tmp_path / "out")), "no chunk is computed again"
    assert contents(tmp_path / "out") == contents(alone)


@pytest.mark.parametrize("beside", [False, True])
def test_a_chunk_that_cannot_be_decoded_is_named_and_those_before_it_are_kept(
    work, alone, tmp_path, monkeypatch, beside
):
    """beside: as on a GPU, where a chunk is decoded while the next one is sampled; the bytes are the same."""
    monkeypatch.setattr(program, "Stages", partial(Stages, beside=beside))
    with monkeypatch.context() as patch:
        decoded, calls = pictures.decoded, []

        def diverged(tokenizer, tokens):
            pixels, finite = decoded(tokenizer, tokens)
            calls.append(len(tokens))
            return pixels, finite & (len(calls) < 3)

        patch.setattr(pictures, "decoded", diverged)
        with pytest.raises(UserError, match=r"^model, samples 12 to 17: the tokenizer decodes to values that are NaN"):
            quietly(program.main, words(work, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.glob("out/.parts/*.npz")) == ["model-000000.npz", "model-000001.npz"]
    quietly(program.main, words(work, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(alone)
    rates = json.loads((tmp_path / "out" / "record.json").read_text())["images_per_s_of_the_last_start"]
    assert rates.keys() == {"sampling", "decoding"}
    assert min(rates.values()) > 0


def test_a_batch_chosen_by_memory_is_recorded_and_resumed_with(work, tmp_path, monkeypatch):
    """All 22 pictures fit, on one rank and on two; with less memory later the batch stays, and what does not fit is
    refused before anything is written."""
    arguments = ["sets=[model]", "batch=auto"]
    said = quietly(program.main, words(work, tmp_path / "auto", *arguments))
    mb = r"[\d.]+ MB"
    assert re.search(rf"batch: 22 pictures of {mb} each \(cache {mb}, .*decoder {mb}\); {mb} are free", said)
    assert json.loads((tmp_path / "auto" / "record.json").read_text())["batch"] == 22
    quietly(program.main, words(work, tmp_path / "twenty-two", "sets=[model]", "batch=22"))
    run_ranks(program.main, 2, words(work, tmp_path / "ranks", *arguments))
    assert contents(tmp_path / "auto") == contents(tmp_path / "twenty-two") == contents(tmp_path / "ranks")
    monkeypatch.setattr(batch, "memory_gb", lambda: 1e-6)
    (tmp_path / "auto" / "model.npz").unlink()
    quietly(program.main, words(work, tmp_path / "auto", *arguments))
    assert contents(tmp_path / "auto") == contents(tmp_path / "twenty-two")
    with pytest.raises(UserError, match=r"^batch: not even one picture fits: it takes .* MB \(cache .* on cpu 80% may"):
        quietly(program.main, words(work, tmp_path / "none", *arguments))
    assert not (tmp_path / "none").exists()


@pytest.mark.long  # the compiler takes seconds
def test_compiled_steps_draw_the_same_pictures_and_say_so(work, alone, tmp_path):
    quietly(program.main, words(work, tmp_path / "out", "sets=[model]", "compile=true"))
    assert contents(tmp_path / "out")["model.npz"] == contents(alone)["model.npz"]
    assert json.loads((tmp_path / "out" / "record.json").read_text())["compile"] is True
    with pytest.raises(UserError, match=r"made in another way \(compile: true -> null\)"):
        quietly(program.main, words(work, tmp_path / "out", "sets=[model]"))


def test_finished_results_are_left_alone_and_another_config_refused(work, alone):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    assert "complete already" in quietly(program.main, words(work, alone))
    sentence = r"already holds results made in another way \(cfg_scale: 2.0 -> 3.0; top_k: 40 -> 0\); use the old"
    with pytest.raises(UserError, match=sentence):
        quietly(program.main, words(work, alone, "cfg_scale=3", "top_k=0"))
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


def test_a_lost_result_is_made_again(work, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "out")
    (tmp_path / "out" / "untrained.npz").unlink()
    quietly(program.main, words(work, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(alone)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["checkpoint={work}/nowhere"], "checkpoint: {work}/nowhere does not exist; give a run directory"),
        (["checkpoint={work}/images"], "checkpoint: {work}/images: no complete checkpoint there"),
        (["checkpoint={work}/tokenizer"], "is not a GPT's run"),
        (["tokenizer={work}/gpt"], "is not a tokenizer's run"),
        (["tokenizer={work}/tokenizer65"], "has 65 codes, but {work}/gpt was trained on 64"),
        (["tokenizer={work}/tokenizer2"], "is not the one whose tokens {work}/gpt was trained on"),
        (["checkpoint={work}/gpt.safetensors"], "is a bare weights file; say what it is, as in model.size=GPT-B"),
        (["image_size=18"], "18 is not a multiple of 4, the pixels per token"),
        (["out={work}/sample.yaml/x"], "cannot be written"),
        (["out={work}/images", "tokens={work}/images"], "holds images, but tokens are needed"),
        (["sets=[model,model]"], "names a set twice"),
        (["cfg_scale=0.5"], "cfg_scale"),
    ],
)
def test_bad_inputs_are_one_sentence_and_write_nothing(work, tmp_path, settings, sentence):
    filled = [setting.format(work=work) for setting in settings]
    before = sorted(work.rglob("*"))
    with pytest.raises(UserError) as refusal:
        quietly(program.main, words(work, tmp_path / "out", *filled))
    assert sentence.format(work=work) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
    assert sorted(work.rglob("*")) == before


def test_without_the_token_shards_the_sizes_come_from_weights_and_tokenizer(work, alone, tmp_path):
    """The data folder is gone: as before for the model, and unigram says what it needs."""
    moved = tmp_path / "gpt"
    shutil.copytree(work / "gpt", moved)
    hidden = work / "tokens"
    hidden.rename(tmp_path / "tokens")
    try:
        with pytest.raises(UserError, match="unigram needs the training token shards"):
            quietly(program.main, words(work, tmp_path / "out", f"checkpoint={moved}"))
        quietly(program.main, words(work, tmp_path / "out", f"checkpoint={moved}", "sets=[model]"))
        bare = [f"checkpoint={work / 'gpt.safetensors'}", *(f"model.{key}={value}" for key, value in SIZES.items())]
        quietly(program.main, words(work, tmp_path / "bare", "sets=[model]", *bare))
        with pytest.raises(UserError, match="say where it is with --tokenizer PATH"):
            cli.main(["generate", str(moved), "--class", "0", "--out", str(tmp_path / "x.png")])
    finally:
        (tmp_path / "tokens").rename(hidden)
    for out in ("out", "bare"):
        assert contents(tmp_path / out)["model.npz"] == contents(alone)["model.npz"]


def test_the_histogram_counts_every_crop(work):
    shards = open_shards(work / "tokens")
    counts = code_counts(TokenReader(shards), range(2))
    assert int(counts.sum()) == 40 * 2 * 16
    parts = [code_counts(TokenReader(shards), [shard]) for shard in (0, 1)]
    assert torch.equal(parts[0] + parts[1], counts)
    assert not torch.equal(parts[0], counts)


def refused_rank(arguments: list[str]) -> str:
    try:
        program.main(arguments)
    except UserError as error:
        return str(error)
    return ""


def test_a_training_file_with_an_average_is_sampled_as_is_said(work, tmp_path, capsys):
    trained = store.read_weights(work / "gpt")
    torch.save({"model": trained, "ema": {name: 0.9 * t for name, t in trained.items()}}, tmp_path / "train.pt")
    bare = [
        f"checkpoint={tmp_path}/train.pt",
        *(f"model.{key}={value}" for key, value in SIZES.items()),
        "sets=[model]",
    ]
    found = {}
    for name, settings, taken in (
        ("default", [], "ema"),
        ("ema", ["weights=ema"], "ema"),
        ("m", ["weights=trained"], "model"),
    ):
        said = quietly(program.main, words(work, tmp_path / name, *bare, *settings))
        assert f"train.pt: took `{taken}` and not `{'model' if taken == 'ema' else 'ema'}`" in said
        found[name] = np.load(tmp_path / name / "model.npz")["arr_0"]
    assert np.array_equal(found["default"], found["ema"])
    assert not np.array_equal(found["default"], found["m"])


def test_every_rank_gets_the_main_ranks_sentence(work, alone):
    sentences = run_ranks(refused_rank, 2, words(work, alone, "seed=5"))
    assert sentences[0] == sentences[1]
    assert "seed: 0 -> 5" in sentences[0]
