"""``llamagen shards show``: the pictures that lie in the shards, each above its own words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen_dist.cli import main
from llamagen_dist.data.images import to_floats
from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.data.shards import CAPTION_MEMBER, LABEL_MEMBER, open_shards
from llamagen_dist.data.tokens import CODES_MEMBER, codes_bytes
from llamagen_dist.data.writer import shard_name, write_shard
from llamagen_dist.errors import UserError
from llamagen_dist.sampling import sheet
from llamagen_dist.sampling.grid import TEXT_LINES, contact_sheet
from llamagen_dist.sampling.load import Tokenizer, load_tokenizer
from llamagen_dist.sampling.pictures import decode_tokens
from tests.image_shards import write_images
from tests.tokenizer_run import TINY, random_tokenizer

SIDE, COUNT = 4, 11

MODEL = TINY | {"z_channels": 8, "codebook_size": 64}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(random_tokenizer(tmp_path_factory.mktemp("tokenizer") / "run", MODEL, 0))


def write_tokens(folder: Path, codes: np.ndarray, tokenizer: Tokenizer, path: Path | None = None) -> Path:
    folder.mkdir()
    members = (CODES_MEMBER, LABEL_MEMBER, CAPTION_MEMBER)
    samples = (
        (
            f"{n:06d}",
            {
                CODES_MEMBER: codes_bytes(one),
                LABEL_MEMBER: str(n % 2).encode(),
                CAPTION_MEMBER: ("word " * n).encode(),
            },
        )
        for n, one in enumerate(codes)
    )
    record = write_shard(folder, shard_name(0), samples, members)
    manifest = Manifest(
        kind="tokens",
        count=len(codes),
        members=members,
        shards=(record,),
        classes=["cat", "dog"],
        image_size=2 * SIDE,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_path=str(path or tokenizer.path),
        vocab_size=64,
        grid=(SIDE, SIDE),
        crops=2,
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def tokens(tmp_path, tokenizer):
    codes = np.random.default_rng(0).integers(64, size=(COUNT, 2, SIDE * SIDE)).astype(np.uint16)
    return write_tokens(tmp_path / "tokens", codes, tokenizer), codes


def holds(page: Image.Image, picture: np.ndarray) -> bool:
    """Whether the enlarged picture stands anywhere on the page, pixel by pixel."""
    tile = np.asarray(Image.fromarray(picture).resize((72, 72), Image.Resampling.NEAREST))
    pixels = np.asarray(page)
    corners = np.argwhere((pixels[:-71, :-71] == tile[0, 0]).all(-1))
    return any(np.array_equal(pixels[y : y + 72, x : x + 72], tile) for y, x in corners)


def test_tokens_are_decoded(tokens, tokenizer, tmp_path, capsys):
    folder, codes = tokens
    main(["shards", "show", str(folder), "--out", str(tmp_path / "new" / "sheet.png"), "--n", "5", "--start", "2"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "sheet.png")
    page = Image.open(tmp_path / "new" / "sheet.png")
    pictures = decode_tokens(tokenizer.model, torch.from_numpy(codes[:, 0].astype(np.int64)))
    shown = [holds(page, picture) for picture in pictures]
    assert shown == [2 <= number < 7 for number in range(COUNT)]
    other_crop = decode_tokens(tokenizer.model, torch.from_numpy(codes[2:3, 1].astype(np.int64)))[0]
    assert not holds(page, other_crop)
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "sheet.png"]


def test_images_are_shown_as_they_are(tmp_path):
    folder = write_images(tmp_path / "images", 3, 24)
    page = sheet.shard_sheet(open_shards(folder), range(1, 3))
    floats = [to_floats(np.array(sheet.read_image(open_shards(folder), n))) for n in range(3)]
    pixels = [((one / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy() for one in floats]
    assert [holds(page, one) for one in pixels] == [False, True, True]


def test_words_stand_under_their_own_picture():
    """More words make more ink below the picture; what does not fit is left out, and tall pictures stay whole."""
    pictures = [Image.new("RGB", (72, 72), "red"), Image.new("RGB", (36, 72), "blue")]
    page = np.asarray(contact_sheet(pictures, ["1", "2 dog\n" + "a few words " * 40])).astype(int)
    below = page[10 + 72 :]
    assert (below[:, : 10 + 72] < 128).any(-1).sum() * 10 < (below[:, 10 + 72 :] < 128).any(-1).sum()
    blue = (page == [0, 0, 255]).all(-1).nonzero()
    assert (np.ptp(blue[0]) + 1, np.ptp(blue[1]) + 1) == (72, 36)
    lines = np.flatnonzero(np.diff(((below < 128).any(-1)).any(1).astype(int)) == 1)
    assert 1 <= len(lines) <= TEXT_LINES


@pytest.mark.parametrize(("words", "sentence"), [
    (["--n", "0"], "--n 0: give 1 or more, at most 1000"),
    (["--start", "11"], "holds samples 0 to 10"),
    (["--start", "-1"], "holds samples 0 to 10"),
    (["--out", "/nowhere/sheet.gif"], "ends in .png or .jpg"),
])  # fmt: skip
def test_wrong_options_get_one_sentence(tokens, tmp_path, words, sentence):
    with pytest.raises(UserError) as refusal:
        main(["shards", "show", str(tokens[0]), "--out", str(tmp_path / "sheet.png"), *words])
    assert sentence in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == {"tokens"}


def test_another_tokenizer_and_bad_codes_are_refused(tokens, tokenizer, tmp_path):
    folder, codes = tokens
    with pytest.raises(UserError, match="holds images, which need none"):
        sheet.shard_sheet(open_shards(write_images(tmp_path / "images", 2, 24)), range(2), tmp_path)
    codes[3, 0, 5] = 64
    bad = open_shards(write_tokens(tmp_path / "bad", codes, tokenizer))
    sheet.shard_sheet(bad, range(0, 3))
    with pytest.raises(UserError, match=r"sample 3.*: a code lies outside the manifest's 64 codes"):
        sheet.shard_sheet(bad, range(2, 5))
    gone = open_shards(write_tokens(tmp_path / "gone", codes, tokenizer, tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere.*is gone; say where it is with --tokenizer PATH"):
        sheet.shard_sheet(gone, range(2))
    sheet.shard_sheet(gone, range(2), tokenizer.path)
    other = random_tokenizer(tmp_path / "other", MODEL, 1)
    with pytest.raises(UserError, match=r"other .sha256 .*….* is not the one that made the tokens"):
        sheet.shard_sheet(open_shards(folder), range(2), other)
