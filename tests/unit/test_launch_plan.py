"""Pipelines before they run: variables, shrinking, identities, secrets; and a process told from its pid."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamagen_dist import cli
from llamagen_dist.commands.quickstart import headline
from llamagen_dist.config import GPTConfigFile, difference, load, shrink
from llamagen_dist.config.section import build
from llamagen_dist.errors import UserError
from llamagen_dist.files import only_launcher, own_folder
from llamagen_dist.launch import listing, local, snapshot
from llamagen_dist.launch.graph import absolute
from llamagen_dist.launch.stages import plan, words
from llamagen_dist.process import Identity, identify
from llamagen_dist.tracking import provenance

ROOT = Path(__file__).resolve().parents[2]
GPT = """kind: gpt
run_dir: runs/x
model: {n_layer: 1, n_head: 1, dim: 8}
data: {train: a, validation: b}
train: {images: 640, global_batch: 64}
"""


def write(folder: Path, stages: str) -> Path:
    (folder / "gpt.yaml").write_text(GPT)
    file = folder / "pipeline.yaml"
    file.write_text(f"kind: pipeline\ntitle: t\nvariables: {{images: here}}\ncounts: {{kept: 100}}\nstages:\n{stages}")
    return file


def test_variables_reach_arguments_config_and_products(tmp_path: Path) -> None:
    stages = """  - name: a
    why: w
    module: m
    arguments: [pack, "{images}/x", "{kept}"]
    produces: ["{out}/p"]
  - {name: b, why: w, module: m, config: gpt.yaml, set: {run_dir: "{out}/run", data.train: "{images}"}}
"""
    made = plan(write(tmp_path, stages), Path("/somewhere/out"), {"images": "/mine"})
    first, second = made.nodes
    assert first.arguments == ("pack", "/mine/x", "100")
    assert first.produces == (Path("/somewhere/out/p"),)
    assert isinstance(second.config, GPTConfigFile)
    assert second.config.run_dir == Path("/somewhere/out/run")
    assert second.config.data.train == Path("/mine")
    assert second.config.data.validation == Path.cwd() / "b"  # jobs run elsewhere: no path stays relative
    assert plan(write(tmp_path, stages), Path("/somewhere/out"), small=0.05).nodes[0].arguments[2] == "5"


@pytest.mark.parametrize(
    ("stages", "variables", "sentence"),
    [
        ('  - {name: a, why: w, module: m, arguments: ["{image}"]}', {}, "{image} is not a variable"),
        ("  - {name: a, why: w, module: m}", {"imags": "x"}, "no variable 'imags'"),
        ("  - {name: a, why: w, module: m, config: gpt.yaml, arguments: [x]}", {}, "not both"),
        ("  - {name: a, why: w, module: m, set: {run_dir: x}}", {}, "set needs config"),
        (
            "  - {name: a, why: w, module: m, config: gpt.yaml, set: {model.dims: 3}}",
            {},
            "did you mean model.dim",
        ),
        ("  - {name: a, why: w, module: m, config: absent.yaml}", {}, "no such config file"),
    ],
)
def test_mistakes_in_a_pipeline_are_sentences(
    tmp_path: Path, stages: str, variables: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match="(?s)" + sentence.replace("{", r"\{").replace(".", r"\.")):
        plan(write(tmp_path, stages + "\n"), tmp_path / "out", variables)


@given(st.integers(1, 400), st.sampled_from([1, 16, 64]), st.floats(0.01, 1.0), st.integers(0, 400))
def test_a_shrunk_config_is_valid_and_about_so_much_shorter(steps: int, batch: int, factor: float, every: int) -> None:
    data = {
        "kind": "gpt", "run_dir": "r", "model": {"n_layer": 1, "n_head": 1, "dim": 8},
        "data": {"train": "a", "validation": "b"}, "train": {"images": steps * batch, "global_batch": batch},
        "validation": {"every_images": every * batch, "at_images": [batch, steps * batch], "images": 1000},
        "ladder": {"small": {"model.dim": 16}, "own": {"train.images": 2 * steps * batch},
                   "batch": {"train.global_batch": 2 * batch, "train.images": 4 * steps * batch}},
    }  # fmt: skip
    config = build(GPTConfigFile, data, "test")
    short = shrink(config, factor)
    assert isinstance(short, GPTConfigFile)
    wanted = steps * batch * factor
    assert abs(short.train.images - wanted) <= batch
    assert max(short.validation.at_images) == short.train.images
    assert (short.validation.every_images == 0) == (every == 0)
    assert short.ladder["small"] == {"model.dim": 16}
    assert abs(short.ladder["own"]["train.images"] - 2 * wanted) <= batch
    assert short.ladder["batch"]["train.images"] % (2 * batch) == 0
    assert shrink(config, 1.0).model_copy(update={"validation": config.validation}) == config


def test_a_stage_knows_what_changed(tmp_path: Path) -> None:
    text = "  - {name: b, why: w, module: m, config: gpt.yaml, set: {train.images: %d}}\n"
    one = plan(write(tmp_path, text % 640), tmp_path / "out").nodes[0]
    two = plan(write(tmp_path, text % 1280), tmp_path / "out").nodes[0]
    assert one.sha256() != two.sha256()
    assert one.changes() == [], "never started"
    one.prepare()
    assert one.changes() == []
    assert two.changes() == ["train.images: 640 -> 1280"]


def test_pictures_to_make_and_to_score_shrink_alike() -> None:
    """Else a small quickstart would be asked for more images than it made."""
    folder = ROOT / "configs/eval"
    sample, evaluate = (shrink(load(folder / f"quickstart-{name}.yaml"), 0.05) for name in ("sample", "evaluate"))
    assert sample.images == evaluate.limit == 25  # type: ignore[attr-defined]
    assert evaluate.classifier.images == 1350  # type: ignore[attr-defined]
    reconstruct = load(folder / "quickstart-reconstruct.yaml")
    assert shrink(reconstruct, 0.05) == reconstruct


def test_the_shipped_quickstart_fits_together(tmp_path: Path) -> None:
    made = plan(ROOT / "configs/pipeline/quickstart.yaml", tmp_path / "out", small=0.05)
    training = ["pack", "tokenizer", "tokens", "ladder", "tp2"]
    then = ["sample", "reconstruct", "evaluate", "scaling", "report"]
    assert [stage.name for stage in made.nodes] == training + then
    configs: dict[str, Any] = {stage.name: stage.config for stage in made.nodes}
    tokenizer, ladder, tp2 = (configs[name] for name in ("tokenizer", "ladder", "tp2"))
    assert configs["tokens"].tokenizer == tokenizer.run_dir
    assert configs["tokens"].image_size == tokenizer.data.image_size
    assert len(tp2.ladder) == 1
    assert tp2.ladder.items() <= ladder.ladder.items()
    differs = difference(ladder, tp2, ignore=["run_dir", "ladder", "train.images", "validation.at_images"])
    assert differs == ["parallel.tensor: 1 -> 2"]  # else the losses could not be compared
    assert tp2.optim.schedule == "warmup", (
        "a constant rate, so that the first half of a run is a run of half the length"
    )
    assert set(tp2.validation.at_images) <= set(ladder.validation.at_images)
    for name in ("ladder", "tp2"):
        for product in next(stage for stage in made.nodes if stage.name == name).produces:
            assert product.parent.name in configs[name].ladder
    sample = configs["sample"]
    assert sample.checkpoint == ladder.run_dir / list(ladder.ladder)[-1]
    assert sample.tokenizer == configs["reconstruct"].tokenizer == tokenizer.run_dir
    assert configs["reconstruct"].images == tokenizer.data.validation
    pairs = configs["evaluate"].pairs()
    assert {pair.images for pair in pairs.values()} == {
        *(sample.out / f"{name}.npz" for name in sample.sets),
        configs["reconstruct"].out / "reconstruction.npz",
        tokenizer.data.validation,
    }
    assert {name: pair.reference for name, pair in pairs.items()} == {
        **dict.fromkeys(pairs, tokenizer.data.train),
        "reconstruction": tokenizer.data.validation,
    }
    assert configs["evaluate"].classifier.train == tokenizer.data.train
    assert configs["evaluate"].classifier.validation == tokenizer.data.validation


def test_every_stage_of_the_quickstart_has_a_size_and_a_folder(tmp_path: Path) -> None:
    made = plan(ROOT / "configs/pipeline/quickstart.yaml", tmp_path / "out")
    found = {stage.name: listing.size(stage) for stage in made.nodes}
    assert found["pack"] == "10,000 images"
    assert found["tokens"] == "1 crop per image"
    assert found["sample"] == "1,500 pictures"
    assert found["evaluate"] == "6 sets of 500 images"
    assert found["reconstruct"] == "1,000 images"
    assert found["ladder"].startswith("6 GPTs (g30k to g390k), ")
    half = plan(ROOT / "configs/pipeline/quickstart.yaml", tmp_path / "out", small=0.5)
    assert next(listing.size(stage) for stage in half.nodes if stage.name == "sample") == "750 pictures"
    folders = {stage.name: listing.writes(stage, made.out) for stage in made.nodes}
    assert all(folders.values())
    assert folders["ladder"] == ["ladder"]
    assert folders["pack"] == ["images/train", "images/validation"]


def test_a_dry_run_measures_nothing_and_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from llamagen_dist import cli; "
        f"cli.main(['quickstart', '--out', {str(tmp_path / 'out')!r}, '--dry-run']); "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stderr.split()[-1] == "False"
    assert "Nothing was started." in out.stdout
    assert "about" not in out.stdout.split("Nothing was started.")[1]


def test_a_dry_run_counts_the_pictures_that_packing_will_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        folder = tmp_path / "mine" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        for ending in (".png", ".txt", ".wav", ".json"):
            (folder / f"{number}{ending}").write_bytes(b"x")
        (folder / f".{number}.png").write_bytes(b"x")
    cli.main(["quickstart", "--images", str(tmp_path / "mine"), "--out", str(tmp_path / "out"), "--dry-run"])
    row = next(line for line in capsys.readouterr().out.splitlines() if " pack " in line)
    assert " 40 images" in row
    quickstart = str(ROOT / "configs/pipeline/quickstart.yaml")
    variable = f"images={tmp_path / 'mine'}"  # of the same pipeline: 10,000 images were listed
    cli.main(["pipeline", quickstart, variable, "--out", str(tmp_path / "out"), "--dry-run"])
    row = next(line for line in capsys.readouterr().out.splitlines() if " pack " in line)
    assert " 40 images" in row
    cli.main(["pipeline", quickstart, "images=/nowhere", "--out", str(tmp_path / "out"), "--dry-run"])
    row = next(line for line in capsys.readouterr().out.splitlines() if " pack " in line)
    assert "images " not in row.partition("llamagen_dist.cli")[2].partition("images/train")[0]


def test_words_of_a_command_line() -> None:
    assert words(["images=/a=b", "n=1"]) == {"images": "/a=b", "n": "1"}
    with pytest.raises(UserError, match="write name=value"):
        words(["images"])


def test_secrets_are_masked_and_tokenizers_are_not() -> None:
    typed = [
        "llamagen",
        "launch",
        "tokenizer=/a",
        "wandb_api_key=abc",
        "--hf-token",
        "def",
        "out=x",
        "MY_SECRET=s",
    ]
    shown = provenance.masked_command(typed)
    assert all(secret not in shown for secret in ("abc", "def", "=s"))
    assert "tokenizer=/a" in shown
    assert shown.endswith("out=x 'MY_SECRET=***'")


def test_the_environment_in_the_record_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    monkeypatch.setenv("HF_TOKEN", "def")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    kept = provenance.record(ROOT)["environment"]
    assert (kept["WANDB_API_KEY"], kept["HF_TOKEN"], kept["OMP_NUM_THREADS"]) == ("***", "***", "3")


def test_a_snapshot_is_taken_once_per_content(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "llamagen_dist").mkdir(parents=True)
    (source / "llamagen_dist/a.py").write_text("x = 1\n")
    (source / "tests").mkdir()
    (source / "tests/t.py").write_text("")
    first = snapshot.take(source, tmp_path / "code")
    assert (first / "llamagen_dist/a.py").read_text() == "x = 1\n"
    assert not (first / "tests").exists()
    assert snapshot.take(source, tmp_path / "code") == first
    (source / "llamagen_dist/a.py").write_text("x = 2\n")
    second = snapshot.take(source, tmp_path / "code")
    assert second != first
    assert (first / "llamagen_dist/a.py").read_text() == "x = 1\n"
    (source / "llamagen_dist/out.py").symlink_to("/etc/hostname")  # a link out of the checkout is not followed
    assert snapshot.take(source, tmp_path / "code") == second


def test_a_reused_pid_is_another_process() -> None:
    me = identify()
    assert me.alive()
    assert not Identity(me.pid, str(int(me.started) - 1)).alive()
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    ended = identify(child.pid)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        pass
    assert not ended.alive()  # a zombie has ended
    child.wait()
    assert not ended.alive()


def test_the_lock_names_its_holder_and_outlives_nobody(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with only_launcher(lock), pytest.raises(UserError, match=f"process {os.getpid()}"), only_launcher(lock):
        pass
    lock.write_text('{"pid": 1, "started": "0"}')  # left by a dead launcher
    with only_launcher(lock):
        assert f'"pid": {os.getpid()}' in lock.read_text()


def test_folders_of_others_and_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        own_folder(tmp_path / "file")
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        own_folder(tmp_path / "a/b")


def test_ranks_get_gpus_only_if_there_is_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert local.devices(2) == "2,3"
    assert local.devices(3) == ""


def test_the_last_lines_say_what_was_measured_and_nothing_else() -> None:
    assert headline({}) == []
    points = [{"name": "s", "val_loss": 3.0}, {"name": "l", "val_loss": 2.5}]
    lines = headline({"tokenizer": {"psnr": 21.04}, "gpt": points, "parity": {"tp_max_abs_loss_diff": 1e-6}})
    assert lines[0].endswith("PSNR 21.0 dB on held-out images")
    assert "2 sizes; best held-out loss 2.500 nats per token (l)" in lines[1]
    assert "1.0e-06" in lines[2]
    scores = {"n": 500, "fid": 90.5, "fid_real": 36.5, "class_agreement": 0.75, "class_agreement_real": 0.86}
    law = {"predicted": 3.2, "ci95": [3.0, 3.5], "measured": 3.1}
    lines = headline({"eval": scores, "scaling": law})
    assert lines[0].endswith("FID 90.5 from 500 images a side (real images 36.5)")
    assert lines[1].endswith("in 75%, on real images 86%")
    assert lines[2].endswith("predicted 3.200 (3.000 to 3.500) for the largest; measured 3.100")
    assert headline({"eval": {"n": 5, "absent": {"fid": "no weights"}}}) == [
        "samples:   FID was not measured: no weights"
    ]


def test_absolute_paths_stay(tmp_path: Path) -> None:
    (tmp_path / "gpt.yaml").write_text(GPT)
    config = absolute(load(tmp_path / "gpt.yaml"))
    assert absolute(config) == config
    assert config.run_dir == Path.cwd() / "runs/x"  # type: ignore[attr-defined]
