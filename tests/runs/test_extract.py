"""Token extraction: the same bytes on any number of ranks and after any interruption; wrong inputs refused."""

import contextlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import tokenizer_training.extract as program
from llamagen_dist.build import build_vq
from llamagen_dist.config import TokenizerModelSection, load
from llamagen_dist.data import images
from llamagen_dist.data.foreign import verify
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.sampling.load import load_tokenizer
from llamagen_dist.sampling.pictures import decode_tokens
from tests import checkpoints as store
from tests.ranks.forked import run_ranks
from tests.tokenizer_run import TINY, save_tokenizer

ROOT = Path(__file__).parent.parent.parent
SIZE, COUNT = 16, 40


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A random tiny tokenizer (run directory and bare file) and images: 16 px sets, and originals of mixed
    sizes.
    """
    folder = tmp_path_factory.mktemp("extract")
    torch.manual_seed(0)
    section = TokenizerModelSection(**TINY)
    model = build_vq(section)
    for number in (1, 2):
        save_tokenizer(folder / f"tokenizer{number}", model, TINY)
        if number == 1:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "bare.safetensors")
        torch.nn.init.normal_(model.quant_conv.weight)  # the second tokenizer is another one
    for n in range(COUNT):
        rng = np.random.default_rng(n)
        image = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
        target = folder / "photos" / f"class{n % 3}"
        target.mkdir(parents=True, exist_ok=True)
        image.resize((30 + n, 28), Image.Resampling.BICUBIC).save(target / f"{n}.png")
    pack(str(folder / "photos"), folder / "small", PackOptions(size=SIZE, held_out=8, samples_per_shard=9))
    pack(str(folder / "photos"), folder / "originals", PackOptions(samples_per_shard=100))
    settings = {
        "kind": "extract",
        "tokenizer": str(folder / "tokenizer1"),
        "images": str(folder / "small"),
        "out": str(folder / "unused"),
        "image_size": SIZE,
        "crops": "center_flip",
        "batch": 10,
        "samples_per_shard": 5,
    }
    (folder / "extract.yaml").write_text(yaml.safe_dump(settings))
    return folder


SLOWLY = """
import runpy, sys, time
import llamagen_dist.data.images as images
crop = images.center_crop
def slow(*arguments):
    time.sleep(0.03)
    return crop(*arguments)
images.center_crop = slow
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def words(work: Path, out: Path, *settings: str) -> list[str]:
    return [str(work / "extract.yaml"), f"out={out}", *settings]


def extract(work: Path, out: Path, *settings: str) -> str:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        program.main(words(work, out, *settings))
    return heard.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def alone(work):
    extract(work, work / "alone")
    return work / "alone"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantizer": "fsq", "levels": [4, 4, 6], "codebook_dim": 8}, "fsq 4,4,6"),
        ({"quantizer": "ema"}, "ema, l2_norm"),
    ],
)
def test_token_shards_name_any_quantizer_and_hold_its_codes(work, tmp_path, options, named):
    torch.manual_seed(1)
    sizes = {**TINY, **options}
    save_tokenizer(tmp_path / "run", build_vq(TokenizerModelSection(**sizes)), sizes)
    extract(work, tmp_path / "out", f"tokenizer={tmp_path / 'run'}")
    shards = open_shards(tmp_path / "out" / "train", "tokens")
    assert (shards.manifest.quantizer, shards.manifest.vocab_size) == (named, 96)
    model = load_tokenizer(tmp_path / "run").model
    pictures = images.load_images(open_shards(work / "small" / "train"), range(4), SIZE)
    codes = TokenReader(shards).codes(np.arange(4), np.zeros(4, np.int64))
    assert np.array_equal(codes, model.encode(images.to_floats(pictures)).flatten(1).numpy())
    assert np.isfinite(decode_tokens(model, torch.from_numpy(codes).long())).all()


def test_codes_are_the_tokenizers_own(work, alone):
    for name, count in (("train", 32), ("validation", 8)):
        shards, pictures = open_shards(alone / name, "tokens"), open_shards(work / "small" / name)
        manifest = shards.manifest
        assert (manifest.count, manifest.crops, manifest.grid, manifest.vocab_size) == (count, 2, (8, 8), 96)
        assert manifest.tokenizer_sha256 == store.identity(work / "tokenizer1")
        assert manifest.quantizer == "vq"
        assert manifest.classes == ["class0", "class1", "class2"]
        assert [record.samples for record in manifest.shards] == [5] * (count // 5) + [count % 5]
        verify(shards)
        model = build_vq(TokenizerModelSection(**TINY)).eval()
        model.load_state_dict(store.read_weights(work / "tokenizer1"))
        pixels = images.load_images(pictures, range(count), SIZE)
        reader, numbers = TokenReader(shards), np.arange(count)
        for crop, view in enumerate((pixels, pixels[:, :, ::-1])):
            expected = model.encode(images.to_floats(np.ascontiguousarray(view))).reshape(count, -1).numpy()
            tokens, labels = reader.codes(numbers, np.full(count, crop)), reader.labels(numbers)
            assert np.array_equal(labels, pictures.labels(range(count)))
            assert (tokens == expected).mean() > 0.999  # the batch shape may move a tie
            assert (tokens == np.roll(expected, 1, axis=0)).mean() < 0.5


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(work, alone, tmp_path, ranks):
    run_ranks(program.main, ranks, words(work, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(alone)
    assert sum(name.endswith(".tar") for name in contents(alone)) == 7 + 2
    assert not [name for name in contents(alone) if "/." in name or name.startswith(".")]  # nothing left behind


def test_another_tokenizer_gives_other_bytes(work, alone, tmp_path):
    extract(work, tmp_path / "out", f"tokenizer={work / 'tokenizer2'}")
    assert contents(tmp_path / "out") != contents(alone)


def test_decoding_threads_change_nothing(work, alone, tmp_path):
    extract(work, tmp_path / "out", "workers=3")
    assert contents(tmp_path / "out") == contents(alone)


def test_killed_ranks_go_on_to_the_same_bytes_and_keep_what_was_finished(work, alone, tmp_path):
    """Real processes; SIGKILL after some shards; continued by another number of ranks."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tokenizer_training.extract", *words(work, out)]
    command[1:2] = ["-c", SLOWLY]  # in place of -m, so that there is time to kill it
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("train/*.tar"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "train" / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")}
    assert 2 <= len(done) < 7
    torn = sorted(done)[1]
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")  # a finished shard that was damaged since is made again
    run_ranks(program.main, 2, words(work, out))
    assert contents(out) == contents(alone)
    kept = [path for path in done if path != torn]
    assert all(path.stat().st_mtime_ns == done[path] for path in kept)


def test_a_finished_extraction_is_left_alone_and_another_refused(work, alone):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    assert "complete already" in extract(work, alone)
    for setting in (f"tokenizer={work / 'tokenizer2'}", "crops=center", "batch=11"):
        with pytest.raises(UserError, match="already holds shards made in another way"):
            extract(work, alone, setting)
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


def test_ten_crops_from_the_originals(work, tmp_path):
    settings = (f"images={work / 'originals'}", "crops=ten_crop", "crop_ranges=[1.1,1.5]")
    extract(work, tmp_path / "out", *settings)
    shards, pictures = open_shards(tmp_path / "out"), open_shards(work / "originals")
    assert (shards.manifest.crops, shards.manifest.count) == (20, COUNT)
    model = build_vq(TokenizerModelSection(**TINY)).eval()
    model.load_state_dict(store.read_weights(work / "tokenizer1"))
    image = images.read_image(pictures, 7)
    views = np.stack([np.asarray(v) for r in (1.1, 1.5) for v in images.ten_crops(image, SIZE, r)])
    expected = model.encode(images.to_floats(views)).reshape(20, -1).numpy()
    tokens = TokenReader(shards).codes(np.full(20, 7), np.arange(20))
    assert (tokens == expected).mean() > 0.999
    assert (tokens == np.roll(expected, 1, axis=0)).mean() < 0.9


def test_a_bare_weights_file_needs_its_sizes(work, alone, tmp_path):
    bare = f"tokenizer={work / 'bare.safetensors'}"
    with pytest.raises(UserError, match="say what it is"):
        extract(work, tmp_path / "out", bare)
    sizes = [f"model.{key}={value}" for key, value in TINY.items()]
    extract(work, tmp_path / "out", bare, *sizes)
    tars = {name: data for name, data in contents(alone).items() if name.endswith(".tar")}
    assert {name: data for name, data in contents(tmp_path / "out").items() if name.endswith(".tar")} == tars
    with pytest.raises(UserError, match="do not fit its sizes"):
        extract(work, tmp_path / "other", bare, *sizes[:-2], "model.codebook_size=97", sizes[-1])


@pytest.mark.parametrize(("setting", "sentence"), [
    ("tokenizer={work}/nowhere", "does not exist; give a run directory"),
    ("tokenizer={work}/photos", "no complete checkpoint there"),
    ("images={work}/nowhere", "the folder does not exist"),
    ("images={work}/photos", "manifest.json is missing"),
    ("images={work}/alone/train", "holds tokens, but images are needed"),
    ("image_size=32", "holds 16 x 16 pixels, but image_size: 32 with crops: center_flip needs 32 x 32"),
    ("crops=ten_crop", "holds 16 x 16 pixels, but image_size: 16 with crops: ten_crop needs 17 x 17"),
    ("image_size=15", "holds 16 x 16 pixels"),
    ("out={work}/extract.yaml/x", "cannot be written"),
])  # fmt: skip
def test_wrong_inputs_get_one_sentence(work, alone, tmp_path, setting, sentence):
    with pytest.raises(UserError) as refusal:
        extract(work, tmp_path / "out", setting.format(work=work))
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_codes_beyond_16_bits_and_odd_sizes_are_refused(work, tmp_path):
    sizes = [f"model.{key}={value}" for key, value in TINY.items() if key != "codebook_size"]
    bare = f"tokenizer={work / 'bare.safetensors'}"
    with pytest.raises(UserError, match="65537 codes do not fit into 16 bits"):
        extract(work, tmp_path / "out", bare, *sizes, "model.codebook_size=65537")
    originals = f"images={work / 'originals'}"
    with pytest.raises(UserError, match="15 is not a multiple of 2"):
        extract(work, tmp_path / "out", originals, "image_size=15")
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, SIZE, SIZE, 3), np.uint8))
    pack(str(tmp_path / "x.npz"), tmp_path / "bare", PackOptions(size=SIZE))
    with pytest.raises(UserError, match="has no class labels"):
        extract(work, tmp_path / "out", f"images={tmp_path / 'bare'}")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crops", ["center", "ten_crop"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_strip_that_would_become_huge_is_refused_by_name(work, tmp_path, workers, crops, precision):
    """1 x 4000 pixels with a shorter side of 256 are 262 million; bf16 looks at images before the extraction does."""
    photos = tmp_path / "photos" / "class"
    photos.mkdir(parents=True)
    Image.new("RGB", (1, 4000)).save(photos / "strip.png")
    pack(str(photos.parent), tmp_path / "images", PackOptions())
    settings = [f"images={tmp_path / 'images'}", f"crops={crops}", f"workers={workers}", f"precision={precision}"]
    with pytest.raises(UserError, match=r"sample \d: 1 x 4000 pixels would become .* more than the limit") as refusal:
        extract(work, tmp_path / "out", *settings, "image_size=256", "batch=1")
    assert "\n" not in str(refusal.value)
    extract(work, tmp_path / "small", *settings, "batch=1")  # the twin: with a shorter side of 16 it is a picture
    assert open_shards(tmp_path / "small", "tokens").manifest.count == 1


def refused_rank(arguments: list[str]) -> str:
    try:
        program.main(arguments)
    except UserError as error:
        return str(error)
    return ""


def test_every_rank_gets_the_main_ranks_sentence(work, alone):
    sentences = run_ranks(refused_rank, 2, words(work, alone, "batch=12"))
    assert sentences[0] == sentences[1]
    assert "made in another way" in sentences[0]


def test_an_image_that_one_rank_cannot_read_ends_them_all_with_its_sentence(work, alone, tmp_path):
    """Not with a broken connection; the others stop after their shard. With the image back, the same bytes."""
    shutil.copytree(work / "small" / "train", tmp_path / "images")
    shards = open_shards(tmp_path / "images")
    _, (offset,), _ = shards.spans(np.array([8]), ".png")
    path = tmp_path / "images" / "shard-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + b"not a PNG" + whole[offset + 9 :])
    arguments = words(work, tmp_path / "out", f"images={tmp_path / 'images'}")
    sentences = run_ranks(refused_rank, 2, arguments)
    assert "shard-000000.tar: sample 8: the image cannot be decoded" in sentences[0]
    assert sentences[1] == sentences[0]
    assert len(list((tmp_path / "out").glob("*.tar"))) < 7
    path.write_bytes(whole)
    run_ranks(program.main, 2, arguments)
    assert contents(tmp_path / "out") == contents(alone / "train")


def test_the_program_from_outside(work, tmp_path):
    """Exit codes and streams of a real process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    shutil.copytree(work / "small", tmp_path / "images")
    with open(tmp_path / "images" / "train" / "shard-000001.tar", "ab") as file:
        file.write(b"\0")
    command = [sys.executable, "-m", "tokenizer_training.extract", *words(work, tmp_path / "out")]
    result = subprocess.run(
        [*command, f"images={tmp_path / 'images'}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("llamagen: error: ")
    assert "shard-000001.tar" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["quickstart", "imagenet"])
def test_shipped_configs_load(name):
    config = load(ROOT / "configs" / "extract" / f"{name}.yaml", kind="extract")
    assert (config.crops, config.image_size) == {
        "quickstart": ("center", 32),
        "imagenet": ("ten_crop", 256),
    }[name]


def test_images_from_a_web_server_give_the_same_codes(work, alone, tmp_path):
    handler = partial(QuietHandler, directory=str(work / "small"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        images = f"images=http://127.0.0.1:{server.server_port}/validation"
        extract(work, tmp_path / "out", images, f"data.cache={tmp_path / 'cache'}")
        server.shutdown()
    assert contents(tmp_path / "out") == contents(alone / "validation")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass
