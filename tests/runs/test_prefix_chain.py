"""Prefix tokens the whole way: extraction, a GPT trained on the rows, pictures and scores of the first k tokens."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eval.reconstruct
import eval.sample
import tokenizer_training.extract
from llamagen_dist import cli
from llamagen_dist.config import load
from llamagen_dist.data.images import load_images, to_floats
from llamagen_dist.data.pack import PackOptions, pack
from llamagen_dist.data.shards import open_shards
from llamagen_dist.data.tokens import TokenReader
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_quality import psnr
from llamagen_dist.evaluation.rate import shortest_prefixes
from llamagen_dist.models.gpt import GPTConfig, rotary_table
from llamagen_dist.models.vq import to_uint8
from llamagen_dist.planning.plan import model_for, tokens_of
from llamagen_dist.sampling.load import load_gpt, load_tokenizer, open_checkpoint
from llamagen_dist.sampling.sampler import generate
from llamagen_dist.train_gpt import main as train_gpt
from tests.ranks.forked import run_ranks
from tests.tokenizer_run import random_tokenizer

SIZE, N, CODES, COUNT = 16, 6, 64, 20
STEP = "tokenizer/checkpoints/step_00000001"
TOKENIZER = {
    "channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": CODES,
    "tokens": "prefix", "token_count": N, "image_size": SIZE, "token_width": 16, "token_layers": 1,
}  # fmt: skip


def quietly(main, *words: object) -> str:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        main([str(word) for word in words])
    return heard.getvalue()


def trained(config: Path) -> None:
    torch.set_num_threads(1)
    quietly(train_gpt, config)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A random prefix tokenizer, its tokens, and a GPT that a few steps trained on them."""
    folder = tmp_path_factory.mktemp("prefix")
    random_tokenizer(folder / "tokenizer", TOKENIZER, 0, SIZE)
    random_tokenizer(
        folder / "grid", {k: v for k, v in TOKENIZER.items() if not k.startswith(("token", "image_s"))}, 0, SIZE
    )
    for n in range(COUNT + 6):
        small = np.random.default_rng(n).integers(0, 256, (3, 3, 3)).astype(np.uint8)
        target = folder / "photos" / f"class{n % 2}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(target / f"{n}.png")
    pack(str(folder / "photos"), folder / "images", PackOptions(size=SIZE, held_out=6))
    settings = {
        "extract": {"tokenizer": folder / "tokenizer", "images": folder / "images", "image_size": SIZE,
                    "out": folder / "tokens", "crops": "center_flip", "batch": 4},
        "gpt": {"run_dir": folder / "gpt", "model": {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 16},
                "data": {"train": folder / "tokens/train", "validation": folder / "tokens/validation"},
                "train": {"images": 32, "global_batch": 8}, "parallel": {"zero": 0}},
        "sample": {"checkpoint": folder / "gpt", "tokenizer": folder / "tokenizer", "out": "x", "images": 5, "batch": 4,
                   "sets": ["model", "untrained", "unigram"]},
        "reconstruct": {"tokenizer": folder / "tokenizer", "images": folder / "images/train", "out": "x", "batch": 8},
    }  # fmt: skip
    for kind, keys in settings.items():
        plain = json.loads(json.dumps(keys, default=str))
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump({"kind": kind, **plain}))
    quietly(tokenizer_training.extract.main, folder / "extract.yaml")
    run_ranks(trained, 1, folder / "gpt.yaml")
    return folder


def test_token_shards_say_that_they_are_no_grid(work, capsys):
    shards = open_shards(work / "tokens/train", "tokens")
    manifest = shards.manifest
    assert (manifest.grid, manifest.order) == ((1, N), "prefix")
    assert manifest.gpt_sizes("x") == {"vocab_size": CODES, "image_tokens": N, "num_classes": 2, "token_rows": 1}
    model = load_tokenizer(work / "tokenizer").model
    images = to_floats(load_images(open_shards(work / "images/train"), range(4), SIZE))
    chosen = np.arange(4)
    codes = TokenReader(shards).codes(chosen, np.zeros_like(chosen))
    assert codes.tolist() == model.encode(images).flatten(1).tolist()
    cli.main(["shards", "stats", str(work / "tokens/train")])
    assert f"a row of {N}, any first k of which are an image, of {CODES} codes" in capsys.readouterr().out
    cli.main(["shards", "show", str(work / "tokens/train"), "--out", str(work / "sheet.png")])
    config = load(work / "gpt.yaml", [], kind="gpt")
    assert model_for(config, tokens_of(config)).grid == (1, N)


def test_a_row_turns_with_the_token_and_not_with_a_grid():
    sizes = {"n_layer": 1, "n_head": 2, "dim": 32, "vocab_size": CODES, "num_classes": 2}
    row, square = (rotary_table(GPTConfig(**sizes, image_tokens=16, token_rows=rows)) for rows in (1, None))
    angles = torch.atan2(row[1:, :, 1], row[1:, :, 0])
    assert torch.equal(angles[:, :4], torch.zeros(16, 4)), "the half that turns with the row"
    assert (row[1:, 4] - torch.stack([torch.arange(16.0).cos(), torch.arange(16.0).sin()], 1)).abs().max() < 1e-6
    assert not torch.equal(row, square)
    assert torch.equal(square, rotary_table(GPTConfig(**sizes, image_tokens=16, token_rows=4)))
    with pytest.raises(ValueError, match="6 is not a square"):
        GPTConfig(**sizes, image_tokens=6)
    with pytest.raises(ValueError, match="6 do not fill 4 rows"):
        GPTConfig(**sizes, image_tokens=6, token_rows=4)


def test_k_tokens_are_the_first_of_all(work):
    """Drawn alone, guided or not, plainly or speculatively; and the twin: another seed has another beginning."""
    tokenizer = load_tokenizer(work / "tokenizer")
    gpt = load_gpt(open_checkpoint(work / "gpt", "checkpoint"), tokenizer)
    assert gpt.config.grid == (1, N)
    labels = torch.tensor([0, 1, 1])
    for settings in ({"cfg_scale": 1.0}, {"cfg_scale": 3.0, "guidance": "linear"}, {"cfg_scale": 2.0, "window": 3}):
        whole = generate(gpt.model, labels, **settings)
        assert whole.shape == (3, N)
        for k in (1, 4, N):
            assert torch.equal(generate(gpt.model, labels, first_tokens=k, **settings), whole[:, :k])
    other = generate(gpt.model, labels, first_tokens=4, seeds=torch.arange(3) + 9)
    assert not torch.equal(other, generate(gpt.model, labels, first_tokens=4))
    with pytest.raises(ValueError, match="first_tokens 7: an image has 6"):
        generate(gpt.model, labels, first_tokens=7)


def test_sets_of_pictures_from_their_first_tokens(work, tmp_path):
    quietly(eval.sample.main, work / "sample.yaml", f"out={tmp_path / 'all'}")
    quietly(eval.sample.main, work / "sample.yaml", f"out={tmp_path / 'two'}", "first_tokens=2")
    record = json.loads((tmp_path / "two/record.json").read_text())
    assert record["first_tokens"] == 2
    for name in ("model", "untrained", "unigram"):
        whole, first = (np.load(tmp_path / run / f"{name}.npz")["arr_0"] for run in ("all", "two"))
        assert first.shape == whole.shape == (5, SIZE, SIZE, 3)
        assert not np.array_equal(first, whole)
    with pytest.raises(UserError, match=r"made in another way \(first_tokens"):
        quietly(eval.sample.main, work / "sample.yaml", f"out={tmp_path / 'two'}")


def test_generate_draws_any_number_of_tokens(work, tmp_path):
    out = tmp_path / "grid.png"
    words = ["generate", str(work / "gpt"), "--class", "class1", "--out", str(out)]
    cli.main([*words, "--grid-over", "first-tokens=1,3,6"])
    cli.main(["generate", "--again", str(out)])
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(tmp_path / "grid-again.png")))
    cli.main([*words[:-1], str(tmp_path / "b.png"), "--first-tokens", "2", "--film", str(tmp_path / "film.png")])
    assert (tmp_path / "film.png").exists()


DRAW = ["generate", "gpt", "--class", "0", "--out", "x.png"]


@pytest.mark.parametrize(
    ("main", "words", "sentence"),
    [
        (eval.sample.main, ["sample.yaml", "first_tokens=7"], "first_tokens: 7 tokens, and .* makes 6"),
        (eval.reconstruct.main, ["reconstruct.yaml", "first_tokens=7"], "7 tokens, and .* makes 6 of an image"),
        (eval.reconstruct.main, ["reconstruct.yaml", "first_tokens=3", "tokenizer=grid"], "grid makes a grid of"),
        (eval.reconstruct.main, ["reconstruct.yaml", "least_psnr=20", "tokenizer=grid"], "least_psnr: .*a grid of"),
        (eval.reconstruct.main, ["reconstruct.yaml", "image_size=32"], "32 is not 16, the pixels along a side"),
        (cli.main, [*DRAW, "--first-tokens", "7"], "--first-tokens: 7 tokens, and"),
        (cli.main, [*DRAW, "--grid-over", "first-tokens=2,9"], "--first-tokens: 9 tokens, and"),
        (cli.main, [*DRAW, "--tokenizer", "grid"], "is not the one whose tokens"),
        (cli.main, ["export", "gpt", "--out", "export"], "draws prefix tokens, which cannot be exported yet"),
        (cli.main, ["export", STEP, "--out", "export"], "makes prefix tokens, which cannot be exported yet"),
    ],
)
def test_what_cannot_be_is_one_sentence(work, monkeypatch, main, words, sentence):
    monkeypatch.chdir(work)
    with pytest.raises(UserError, match=sentence):
        quietly(main, *words)
    assert not (work / "x.png").exists()
    assert not (work / "export").exists()


def test_fewer_tokens_cost_fewer_bits_and_the_rate_can_follow_the_image(work, tmp_path):
    model = load_tokenizer(work / "tokenizer").model
    pixels = load_images(open_shards(work / "images/train"), range(COUNT), SIZE)
    codes, truth = model.encode(to_floats(pixels)), torch.from_numpy(pixels).permute(0, 3, 1, 2)
    at = torch.stack([psnr(to_uint8(model.decode(codes[..., :k])), truth) for k in range(1, N + 1)], 1)

    def measured(name: str, *words: str) -> dict[str, float]:
        quietly(eval.reconstruct.main, work / "reconstruct.yaml", f"out={tmp_path / name}", *words)
        return json.loads((tmp_path / name / "record.json").read_text())

    for k in (2, N):
        record = measured(str(k), f"first_tokens={k}")
        assert (record["tokens"], record["bits_per_image"]) == (k, k * 6)
        assert record["psnr"] == pytest.approx(float(at[:, k - 1].mean()), abs=1e-3)
    middle = at.numel() // 2
    least = float(at.flatten().sort().values[middle - 1 : middle + 1].mean())  # half of all images and lengths reach it
    wanted = [next((k for k in range(1, N) if row[k - 1] >= least), N) for row in at]
    assert len(set(wanted)) > 1
    assert shortest_prefixes(model, codes, truth, least).tolist() == wanted
    record = measured("rate", f"least_psnr={least}")
    assert record["tokens"] == pytest.approx(sum(wanted) / COUNT)
    assert shortest_prefixes(model, codes, truth, least + 50).tolist() == [N] * COUNT, "the twin: nothing reaches it"
    assert measured("easy", "least_psnr=0.01")["tokens"] == 1
