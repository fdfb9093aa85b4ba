"""The captioned set from the emoji-datasource package, on a package of the same shape drawn here."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import emoji, text_encoder
from examples.emoji import TONES, prepare_emoji
from llamagen_dist.cli import main
from llamagen_dist.data.captions import clean
from llamagen_dist.data.shards import CAPTION_MEMBER, SHORT_CAPTION_MEMBER, open_shards
from llamagen_dist.data.text_encoder import CaptionEncoder
from llamagen_dist.errors import UserError
from llamagen_dist.launch.snapshot import take
from llamagen_dist.launch.stages import plan
from tests.image_shards import write_images

CONFIGS = Path(__file__).parent.parent.parent / "configs"
NAMES = ["BABY ANGEL", "CLAPPING HANDS", "NAIL POLISH", "NOSE"]  # come in skin tones


def png(red: int) -> bytes:
    """Half of it is transparent, above a colour that must not be seen."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (red, 10, 20, 255)
    pixels[:, 32:] = (0, 200, 0, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def entry(number: int, name: str, toned: bool) -> dict:
    made = {
        "name": name,
        "image": f"{number:04x}.png",
        "category": "People & Body",
        "subcategory": "hand-prop",
    }
    if toned:
        pairs = ["1F3FB-1F3FF", "1F3FB-1F3FB"] if number == 0 else []
        made["skin_variations"] = {tone: {"image": f"{number:04x}-{tone.lower()}.png"} for tone in (*TONES, *pairs)}
    return made


def package() -> dict[str, bytes]:
    entries = [entry(number, name, True) for number, name in enumerate(NAMES)]
    entries.append(entry(9, "St. Lucia Flag", False))
    files = {"emoji.json": json.dumps(entries).encode(), "img/google/sheets-64/64.png": b"not opened"}
    for number, made in enumerate(entries):
        for drawn in (made, *made.get("skin_variations", {}).values()):
            files[f"img/google/64/{drawn['image']}"] = png(50 * number)
    return files


def as_folder(files: dict[str, bytes], path: Path) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def as_tgz(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_held_out_captions_are_new_but_their_words_are_not(tmp_path):
    assert prepare_emoji(as_folder(package(), tmp_path / "package"), tmp_path / "out") == (23, 2 + 1)
    train, held_out = lines(tmp_path / "out/train.jsonl"), lines(tmp_path / "out/validation.jsonl")
    seen = {line["short"] for line in train}
    assert not seen & {line["short"] for line in held_out}
    assert [line["short"] for line in held_out] == ["baby angel with light skin"] * 2 + [
        "nail polish with medium light skin"
    ]
    for line in held_out:
        assert set(line["short"].split()) <= {word for other in seen for word in other.split()}
        assert line["short"].split(" with ")[0] in seen
        assert line["text"] == f"{line['short']}. hand prop."
    assert "baby angel with light and dark skin" in seen
    assert not any("flag" in caption for caption in seen), "comes in one colour only"


def test_pictures_stand_on_white(tmp_path):
    prepare_emoji(as_folder(package(), tmp_path / "package"), tmp_path / "out")
    for line in lines(tmp_path / "out/train.jsonl"):
        with Image.open(tmp_path / "out" / line["image_path"]) as image:
            pixels = np.asarray(image)
        assert image.mode == "RGB"
        assert (pixels[:, 32:] == 255).all()
        assert pixels[0, 0].tolist()[1:] == [10, 20]


def test_the_download_and_its_unpacked_folder_are_the_same(tmp_path):
    out = tmp_path / "out"
    prepare_emoji(as_tgz(package(), tmp_path / "package.tgz"), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    prepare_emoji(as_folder(package(), tmp_path / "package"), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "not made again"
    other = {**package(), "img/google/64/0003.png": png(7)}
    with pytest.raises(UserError, match="already holds captioned pictures made in another way"):
        prepare_emoji(as_folder(other, tmp_path / "other"), out)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"emoji.json": None}, "no emoji.json in it"),
        ({"emoji.json": b"[{}]"}, "holds 0 of the pictures"),
        ({"emoji.json": b"[3]"}, "not as expected"),
        ({"emoji.json": b"\xff"}, "not as expected"),
        ({"emoji.json": json.dumps([{**entry(0, "X", True), "image": "../up.png"}]).encode()}, None),
        ({"img/google/64/0001.png": png(0)[:-60]}, "0001.png cannot be decoded"),
        ({"emoji.json": json.dumps([entry(77, "X", True)]).encode()}, "holds 0 of the pictures"),
    ],
)
def test_another_package_is_refused_and_nothing_is_left(tmp_path, change, sentence):
    files = {name: data for name, data in {**package(), **change}.items() if data is not None}
    source = as_folder(files, tmp_path / "package")
    if sentence is None:
        prepare_emoji(source, tmp_path / "out")
        assert not (tmp_path / "up.png").exists()
        return
    with pytest.raises(UserError, match=sentence) as refusal:
        prepare_emoji(source, tmp_path / "out")
    assert "npm pack emoji-datasource-google" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_cut_download_is_refused(tmp_path):
    whole = as_tgz(package(), tmp_path / "package.tgz").read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[: len(whole) // 2])
    for source in ("cut.tgz", "none.tgz"):
        with pytest.raises(UserError, match="cannot be read"):
            prepare_emoji(tmp_path / source, tmp_path / "out")


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    source = as_folder(package(), tmp_path / "package")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match="holds file, which this command did not write"):
        prepare_emoji(source, tmp_path / "mine")
    prepare_emoji(source, tmp_path / "out")
    (tmp_path / "out" / "made_from.json").unlink()
    with pytest.raises(UserError, match="which this command did not write"):
        prepare_emoji(source, tmp_path / "out")
    assert (tmp_path / "mine" / "file").exists()


def test_from_the_download_to_a_text_encoder_that_knows_its_captions(tmp_path, capsys):
    as_tgz(package(), tmp_path / "package.tgz")
    emoji.main([str(tmp_path / "package.tgz"), "--out", str(tmp_path / "out")])
    assert "23 captioned pictures in train.jsonl, 3 with other captions in validation.jsonl" in capsys.readouterr().out
    for name in ("train", "validation"):
        source, shards = tmp_path / f"out/{name}.jsonl", tmp_path / name
        main(["pack", str(source), "--size", "8", "--out", str(shards), "--jobs", "1"])
    command = [str(tmp_path / "train"), "--out", str(tmp_path / "t5"), "--dim", "16"]
    text_encoder.main(command)
    encoder = CaptionEncoder(tmp_path / "t5")
    held_out = open_shards(tmp_path / "validation", "images")
    for sample in range(len(held_out)):
        for member in (CAPTION_MEMBER, SHORT_CAPTION_MEMBER):
            ids = encoder.tokenizer(clean(held_out.read(sample, member).decode())).input_ids
            assert encoder.tokenizer.unk_token_id not in ids
            assert ids[-1] == encoder.tokenizer.eos_token_id
    assert encoder.tokenizer.unk_token_id in encoder.tokenizer("a giraffe").input_ids
    text_encoder.main(command)  # a pipeline may run it again
    with pytest.raises(UserError, match=r"already holds a text encoder made in another way \(dim: 16 -> 24"):
        text_encoder.main([*command[:-1], "24"])
    with pytest.raises(UserError, match="multiple of 8"):
        text_encoder.main([*command[:-1], "20"])


def test_a_text_encoder_needs_captions(tmp_path):
    shards = write_images(tmp_path / "images", 4, 8)
    with pytest.raises(UserError, match="has no captions"):
        text_encoder.main([str(shards), "--out", str(tmp_path / "t5")])
    assert not (tmp_path / "t5").exists()


def test_the_stages_of_the_recipe_fit_together(tmp_path):
    made = plan(CONFIGS / "pipeline/text-to-image.yaml", tmp_path, {"package": "/somewhere.tgz"})
    stages = {stage.name: stage for stage in made.nodes}
    extract, gpt, sample = (stages[name].config for name in ("tokens", "gpt", "sample"))
    tokenizer = stages["tokenizer"].config
    option = dict(zip(stages["text-encoder"].arguments, stages["text-encoder"].arguments[1:], strict=False))
    assert gpt.model.caption_dim == int(option["--dim"])
    assert gpt.model.prefix_tokens == extract.max_caption_tokens
    assert gpt.data.short_captions == 0 or extract.short_captions
    for name in ("pack", "pack-held-out"):
        arguments = dict(zip(stages[name].arguments, stages[name].arguments[1:], strict=False))
        assert int(arguments["--size"]) == extract.image_size == tokenizer.data.image_size
    assert str(extract.text_encoder) == option["--out"]
    assert sample.captions == gpt.data.validation == extract.out / "validation"
    assert sample.checkpoint == gpt.run_dir
    assert sample.tokenizer == extract.tokenizer == tokenizer.run_dir
    assert stages["pictures"].arguments[0] == "/somewhere.tgz"


def test_a_jobs_copy_of_the_code_holds_the_programs_of_the_recipe(tmp_path):
    made = plan(CONFIGS / "pipeline/text-to-image.yaml", tmp_path, {"package": "/somewhere.tgz"})
    copy = take(CONFIGS.parent, tmp_path / "code")
    modules = {stage.module for stage in made.nodes}
    assert {"examples.emoji", "examples.text_encoder"} < modules
    assert not [module for module in modules if not (copy / f"{module.replace('.', '/')}.py").is_file()]


def test_all_pictures_have_classes_and_every_emoji_is_on_one_side(tmp_path):
    files = package()
    same = [entry(0x1F1E6 + number, f"Flag {number}", False) | {"category": "Flags"} for number in range(60)]
    entries = json.loads(files["emoji.json"]) + same
    files["emoji.json"] = json.dumps(entries).encode()
    for number, made in enumerate(entries):
        for tone, drawn in enumerate((made, *made.get("skin_variations", {}).values())):
            # the last two flags are one picture, byte for byte
            files[f"img/google/64/{drawn['image']}"] = png(0) + f"{min(number, 63)} {tone}".encode()
    source = as_folder(files, tmp_path / "package")
    train, held = prepare_emoji(source, tmp_path / "out", every=True)
    both = [lines(tmp_path / "out" / name) for name in ("train.jsonl", "validation.jsonl")]
    assert [len(both[0]), len(both[1])] == [train, held]
    assert train + held == 23 + 3 + 1 + 60 - 1, "tones, the one without, flags less the repeated one"
    sides = [{Path(line["image_path"]).name.split("-")[0].split(".")[0] for line in side} for side in both]
    assert not sides[0] & sides[1], "the tones of an emoji are on one side"
    for name in sides[1]:  # by the hash of the file's name, whatever else is in the package
        assert hashlib.sha256(f"{name}.png".encode()).digest()[0] < 26
    assert held > 0
    assert all(line["class"] == ("Flags" if line["short"].startswith("flag ") else "People & Body") for line in both[0])
    with pytest.raises(UserError, match="made in another way"):
        prepare_emoji(source, tmp_path / "out")
    main(["pack", str(tmp_path / "out/train.jsonl"), "--size", "64", "--out", str(tmp_path / "shards"), "--jobs", "1"])
    shards = open_shards(tmp_path / "shards", "images")
    assert (len(shards), shards.manifest.classes) == (train, ["Flags", "People & Body"])
    assert shards.manifest.image_size == 64


def test_pictures_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    bomb = io.BytesIO()
    Image.new("L", (1100, 1000)).save(bomb, "PNG")  # small in the file
    files = package() | {"img/google/64/0001.png": bomb.getvalue()}
    with pytest.raises(UserError, match=r"0001\.png cannot be decoded \(1100 x 1000 pixels, more than the limit"):
        prepare_emoji(as_folder(files, tmp_path / "package"), tmp_path / "out")
    monkeypatch.setattr(emoji, "_LIMIT_OF_ALL", 2000)
    with pytest.raises(UserError, match="its small pictures hold more than"):
        prepare_emoji(tmp_path / "package", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_stages_of_the_colour_recipe_fit_together(tmp_path):
    stages = {s.name: s for s in plan(CONFIGS / "pipeline/colour.yaml", tmp_path, {"package": "/a.tgz"}).nodes}
    tokenizer, back = stages["tokenizer"].config, stages["reconstruct"].config
    assert back.tokenizer == tokenizer.run_dir
    assert str(back.images) == str(tokenizer.data.validation)
    for name, folder in (("pack", tokenizer.data.train), ("pack-held-out", tokenizer.data.validation)):
        words = stages[name].arguments
        assert words[words.index("--out") + 1] == str(folder)
        assert int(words[words.index("--size") + 1]) == tokenizer.data.image_size
