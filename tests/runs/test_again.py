"""A picture of llamagen generate says how it was made: drawn again it is the same; changed words are noticed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llamagen_dist import cli
from llamagen_dist.errors import UserError
from llamagen_dist.sampling import png_record
from tests import checkpoints as store
from tests.runs.sampling_work import make_work

SAME = "when it was drawn, pixel by pixel"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("again"))


@pytest.fixture(scope="module")
def drawn(work) -> Path:
    """More pictures than a batch holds, so that there are two shapes."""
    out = work / "drawn.png"
    words = ["--class", "class 2", "0", "--seeds", "4-20", "--cfg", "3", "--top-k", "30", "--weights", "ema"]
    words += ["--guidance", "power-cosine"]
    cli.main(["generate", str(work / "gpt"), *words, "--out", str(out), "--film", str(work / "film.png")])
    return out


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def rewritten(source: Path, path: Path, **changes: object) -> Path:
    """The picture with a record that was changed and given a digest that fits."""
    record, _ = png_record.read_record(source)
    Image.open(source).save(path, pnginfo=png_record.record_text(record | changes))
    return path


def again(picture: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    cli.main(["generate", "--again", str(picture), *words])
    return capsys.readouterr().out


def test_the_record_names_all_that_decides_the_picture(work, drawn):
    record, now = png_record.read_record(drawn)
    assert record["pixels_sha256"] == now
    assert record["checkpoint_sha256"] == store.identity(work / "gpt", "ema")
    assert record["tokenizer_sha256"] == store.identity(work / "tokenizer")
    assert (record["rows"], record["names"]) == ([2, 0], ["class 2", "class 0"])
    assert record["pictures"] == [[seed, 0] for seed in range(4, 21)]
    assert record["batch"] == [32, 2]
    assert record["settings"]["guidance"] == "power-cosine"
    assert (record["settings"]["cfg_scale"], record["settings"]["top_k"], record["weights"]) == (3.0, 30, "ema")
    assert {"torch", "numpy", "pillow", "python"} <= record["versions"].keys()


def test_again_is_the_same_picture_and_a_changed_seed_another(work, drawn, tmp_path, capsys):
    assert SAME in again(drawn, capsys, "--out", f"{tmp_path}/new/a.png")
    assert np.array_equal(pixels(tmp_path / "new" / "a.png"), pixels(drawn))
    assert SAME in again(tmp_path / "new" / "a.png", capsys), "the copy says as much as the first"
    assert (tmp_path / "new" / "a-again.png").exists()
    for name, change in (
        ("seed", {"pictures": [[seed, 0] for seed in range(5, 22)]}),
        ("settings", {"settings": {"cfg_scale": 3.0, "top_k": 29}}),
    ):
        other = rewritten(drawn, tmp_path / f"{name}.png", **change)
        assert "not the same as" in again(other, capsys), name
        assert not np.array_equal(pixels(tmp_path / f"{name}-again.png"), pixels(drawn)), name


def test_a_film_and_a_grid_over_settings_can_be_drawn_again(work, drawn, tmp_path, capsys):
    assert SAME in again(work / "film.png", capsys, "--out", f"{tmp_path}/film.png")
    assert np.array_equal(pixels(tmp_path / "film.png"), pixels(work / "film.png"))
    words = ["--class", "1", "--grid-over", "cfg=1,4", "top-k=0,3", "--out", f"{tmp_path}/grid.png"]
    cli.main(["generate", str(work / "gpt"), *words])
    assert SAME in again(tmp_path / "grid.png", capsys)


def test_every_way_of_drawing_is_recorded_and_drawn_again(work, tmp_path, capsys):
    seen = set()
    for words, setting in (
        (["--guidance", "linear"], ("guidance", "linear")),
        (["--guidance", "power-cosine", "--guidance-power", "1.5"], ("guidance_power", 1.5)),
        (["--guidance", "step", "--guidance-start", "0.5"], ("guidance_start", 0.5)),
        (["--cfg-interval", "4"], ("cfg_interval", 4)),
        (["--window", "4"], ("window", 4)),
    ):
        out = tmp_path / f"{setting[0]}.png"
        cli.main(
            ["generate", str(work / "gpt"), "--class", "1", "--cfg", "6", "--seeds", "0-3", *words, "--out", str(out)]
        )
        record, digest = png_record.read_record(out)
        assert record["settings"][setting[0]] == setting[1]
        assert SAME in again(out, capsys)
        seen.add(digest)
    assert len(seen) == 5, "the twin: each draws other pictures than the others"


def test_int8_weights_are_recorded_and_drawn_again(work, tmp_path, capsys):
    out = tmp_path / "int8.png"
    words = ["--class", "1", "--seeds", "0-63", "--quantize", "int8"]
    cli.main(["generate", str(work / "gpt"), *words, "--out", str(out)])
    assert png_record.read_record(out)[0]["quantize"] == "int8"
    assert SAME in again(out, capsys)
    with pytest.raises(UserError, match="--quantize: --again takes that from"):
        cli.main(["generate", "--again", str(out), "--quantize", "int8"])
    twin = rewritten(out, tmp_path / "plain.png", quantize=None)
    assert "not the same as" in again(twin, capsys)


def test_pictures_that_do_not_say_how_they_were_made_are_refused(work, drawn, tmp_path):
    plain, jpeg, forged, broken = (tmp_path / name for name in ("plain.png", "a.jpg", "forged.png", "broken.png"))
    Image.open(drawn).save(plain)
    Image.open(drawn).save(jpeg)
    text = Image.open(drawn).text[png_record.KEYWORD]
    for path, words in ((forged, text.replace("[4, 0]", "[5, 0]")), (broken, text[:-40])):
        assert words != text
        changed = PngInfo()
        changed.add_itxt(png_record.KEYWORD, words)
        Image.open(drawn).save(path, pnginfo=changed)
    (tmp_path / "cut.png").write_bytes(drawn.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    strange = rewritten(drawn, tmp_path / "strange.png", settings={"cfg_scale": 3.0, "speed": 9})
    impossible = rewritten(drawn, tmp_path / "impossible.png", settings={"temperature": -1.0})
    short = rewritten(drawn, tmp_path / "short.png", batch=[32])
    rows = rewritten(drawn, tmp_path / "rows.png", rows=[2, 4])
    for path, sentence in (
        (plain, "does not say how it was made"),
        (jpeg, "does not say how it was made"),
        (forged, "was changed or damaged since"),
        (broken, "was changed or damaged since"),
        (tmp_path / "cut.png", "cannot be read as a picture"),
        (tmp_path / "text.png", "cannot be read as a picture"),
        (tmp_path / "nowhere.png", "cannot be read as a picture"),
        (strange, "this version does not know speed"),
        (impossible, "temperature -1"),
        (short, "do not add up to the 2 x 17 pictures"),
        (rows, "there are 4 classes or captions, 0 to 3"),
    ):
        with pytest.raises(UserError, match=sentence) as refusal:
            cli.main(["generate", "--again", str(path), "--out", str(tmp_path / "out.png")])
        assert str(path) in str(refusal.value)
        assert not (tmp_path / "out.png").exists()


def test_other_weights_at_the_path_are_refused_and_moved_ones_can_be_named(work, drawn, tmp_path, capsys):
    mixed = rewritten(drawn, tmp_path / "mixed.png", tokenizer_sha256="0" * 64)
    with pytest.raises(UserError, match=r"was drawn by the tokenizer with sha256 .*, but .*tokenizer has"):
        cli.main(["generate", "--again", str(mixed)])
    other = rewritten(drawn, tmp_path / "other.png", weights="weights")  # the trained ones in place of their average
    with pytest.raises(UserError, match=r"was drawn by the checkpoint with sha256 .*…, but .* has .*say where"):
        cli.main(["generate", "--again", str(other)])
    moved = shutil.copytree(work / "gpt", tmp_path / "moved")
    gone = rewritten(drawn, tmp_path / "gone.png", checkpoint=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"gone does not exist"):
        cli.main(["generate", "--again", str(gone)])
    assert SAME in again(gone, capsys, str(moved))


def test_again_takes_everything_from_the_picture_and_sees_changed_pixels(drawn, tmp_path, capsys):
    for words, named in ((["--cfg", "4"], "--cfg"), (["--seeds", "0-3"], "--seeds"), (["--ema"], "--weights")):
        with pytest.raises(UserError, match=f"{named}: --again takes that from"):
            cli.main(["generate", "--again", str(drawn), *words])
    record, _ = png_record.read_record(drawn)
    painted = Image.open(drawn)
    painted.putpixel((3, 3), (255, 0, 0))
    painted.save(tmp_path / "painted.png", pnginfo=png_record.record_text(record))
    said = again(tmp_path / "painted.png", capsys)
    assert "its pixels were changed since it was drawn" in said
    assert SAME in said
    assert np.array_equal(pixels(tmp_path / "painted-again.png"), pixels(drawn))


def test_a_jpeg_is_written_with_a_hint_that_it_cannot_be_drawn_again(work, tmp_path, capsys):
    cli.main(["generate", str(work / "gpt"), "--class", "0", "--seeds", "1", "--out", f"{tmp_path}/a.jpg"])
    assert f"{tmp_path}/a.jpg    # only a .png says how it was made" in capsys.readouterr().out
    assert json.loads(Image.open(tmp_path / "a.jpg").info.get("comment", "null")) is None
