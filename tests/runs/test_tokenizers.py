"""eval.tokenizers on tiny tokenizers: every step's own numbers in one table, killed and resumed, and what it refuses.

The steps run in this process with a quick network in the extractor's shoes; the long test launches them for real.
"""

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eval.tokenizers as program
from llamagen_dist.config import TokenizersConfig, load
from llamagen_dist.config.section import build, shrink
from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.data.writer import label_text, shard_name, write_shard
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import inception, inception_weights
from llamagen_dist.launch.graph import Graph
from tests.runs.sampling_work import SIZE, TOKENIZER, quietly, tokenizer_run

ROOT = Path(__file__).parent.parent.parent
CLASSES, HELD_OUT = 3, 12
KINDS = {
    "vq": {},
    "fsq": {"quantizer": "fsq", "levels": [4, 4, 4], "codebook_dim": 8},
    "lfq": {"quantizer": "lfq", "codebook_dim": 8},
}


class Quick(torch.nn.Module):
    """In the extractor's shoes: waves of the picture's coarse colours."""

    fc = None

    def forward(self, images: torch.Tensor) -> inception.Features:
        coarse = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 4).flatten(1)
        mix = torch.randn(coarse.shape[1], inception.POOL_FEATURES, generator=torch.Generator().manual_seed(0))
        pool = (coarse @ mix).sin()
        return inception.Features(pool, pool[:, : inception.SPATIAL_FEATURES].abs(), None)


RECORD: dict[str, object] = {"network": "quick", "weights_sha256": "0" * 64, "arithmetic": "float32", "resize": "none"}


@pytest.fixture
def quick(monkeypatch):
    extractor = inception_weights.Extractor(Quick(), RECORD)
    monkeypatch.setattr(inception_weights, "open_extractor", lambda *arguments, **options: extractor)


def labelled(folder: Path, count: int, seed: int, classes: int = CLASSES) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)

    def samples():
        for number in range(count):
            small = rng.integers(256, size=(4, 4, 3)).astype(np.uint8)
            picture = io.BytesIO()
            Image.fromarray(small).resize((SIZE, SIZE)).save(picture, "PNG")
            label = label_text(number % classes, classes)
            yield f"{number:08d}", {".png": picture.getvalue(), ".cls": label}

    members = (".png", ".cls")
    record = write_shard(folder, shard_name(0), samples(), members)
    names = [f"class {number}" for number in range(classes)]
    write_manifest(folder, Manifest("images", count, members, (record,), names, SIZE))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    for number, (name, changes) in enumerate(KINDS.items()):
        tokenizer_run(folder / name, number, **{**TOKENIZER, **changes})
    labelled(folder / "images" / "train", 24, 0)
    labelled(folder / "images" / "validation", HELD_OUT, 1)
    settings = {
        "kind": "tokenizers",
        "tokenizers": {name: str(folder / name) for name in KINDS},
        "images": str(folder / "images"),
        "out": str(folder / "unused"),
        "perturb": {"neighbours": 4},
        "probe": {
            "model": {"n_layer": 1, "n_head": 2, "dim": 16, "multiple_of": 8},
            "train": {"images": 32, "global_batch": 8},
            "optim": {"lr": 1e-2},
            "seeds": [0, 1],
        },
        "batch": 6,
        "threads": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


def words(work: Path, out: Path, *settings: str) -> list[str]:
    return [str(work / "config.yaml"), f"out={out}", *settings]


def in_this_process(graph: Graph, before: Callable[[str], None] = lambda name: None) -> None:
    """The launcher's part without its processes: every unfinished step in order."""
    graph.check()
    graph.keep()
    for node in graph.nodes:
        if not node.is_finished():
            before(node.name)
            arguments, _ = node.prepare()
            importlib.import_module(node.module).main(list(arguments))
            assert node.missing() is None
            node.job.finish(node.record(Path("code"), 1), 1.0, 0.1)


@pytest.fixture
def alone(work, quick, monkeypatch) -> Path:
    """One whole comparison, made once."""
    monkeypatch.setattr(program.here, "run", in_this_process)
    if not (work / "alone").exists():
        said = quietly(program.main, words(work, work / "alone"))
        assert "orders the 3 tokenizers most as the probe's FID does" in said
        assert "complete already" in quietly(program.main, words(work, work / "alone"))
    return work / "alone"


def results(out: Path) -> dict:
    """Without what is timed."""
    content = json.loads((out / "results.json").read_text())
    for one in content["tokenizers"].values():
        one.pop("speed")
    return content


def test_the_table_has_what_each_step_measured(alone):
    content = json.loads((alone / "results.json").read_text())
    assert list(content["tokenizers"]) == list(KINDS)
    scored = json.loads((alone / "steps" / "probe.json").read_text())
    for name, one in content["tokenizers"].items():
        record = json.loads((alone / "steps" / name / "reconstruction" / "record.json").read_text())
        keys = ("psnr", "ssim", "ssim_llamagen", "rfid", "pfid", "codebook_usage", "codebook_perplexity")
        assert {key: one[key] for key in keys} == {key: record[key] for key in keys}
        assert one["bits_per_pixel"] == 6 * 16 / SIZE**2
        fids = [scored["sets"][f"{name}, seed {seed}"]["fid"] for seed in (0, 1)]
        assert [seed["fid"] for seed in one["probe"]["seeds"].values()] == fids
        assert one["probe"]["fid"] == pytest.approx(np.mean(fids), rel=1e-12)
        assert fids[0] != fids[1], "each seed trains and draws its own"
        assert min(one["speed"].values()) > 0
        assert {seed["val_loss"] > 0 for seed in one["probe"]["seeds"].values()} == {True}
    assert {"psnr", "rfid", "pfid"} <= set(content["correlations"])
    assert {len(np.load(file)["arr_0"]) for file in alone.glob("steps/*/pictures-*/model.npz")} == {HELD_OUT}
    assert len(np.load(alone / "steps" / "originals.npz")["arr_0"]) == HELD_OUT
    assert "| vq | vq | 64 | 16 |" in (alone / "results.md").read_text()
    assert Image.open(alone / "results.png").width > 500
    record = json.loads((alone / "record.json").read_text())
    assert set(record["tokenizers"]) == set(KINDS)


class Killed(BaseException):
    pass


def test_killed_and_resumed_the_scores_are_equal(work, quick, tmp_path, monkeypatch):
    killed_and_resumed(work, tmp_path, monkeypatch, ["fsq-reconstruct"], "probe=null")


@pytest.mark.long
def test_killed_and_resumed_the_probes_are_equal(work, quick, tmp_path, monkeypatch):
    killed_and_resumed(work, tmp_path, monkeypatch, ["fsq-reconstruct", "fsq-pictures-1", "scores"])


def killed_and_resumed(work: Path, tmp_path: Path, monkeypatch, stops: list[str], *settings: str) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    for stop in stops:

        def dies(name: str, stop: str = stop) -> None:
            if name == stop:
                raise Killed

        monkeypatch.setattr(program.here, "run", lambda graph, dies=dies: in_this_process(graph, dies))
        with pytest.raises(Killed):
            quietly(program.main, words(work, out, *settings))
        assert not (out / "results.json").exists()
    monkeypatch.setattr(program.here, "run", in_this_process)
    quietly(program.main, words(work, alone, *settings))
    with pytest.raises(UserError, match=r"holds .*a comparison of tokenizers made in another way .*limit: null -> 6"):
        program.main(words(work, out, "limit=6", *settings))
    shutil.copytree(out, tmp_path / "changed")
    quietly(program.main, words(work, out, *settings))
    assert results(out) == results(alone)
    # twin: a step's result that was changed meanwhile is seen
    file = tmp_path / "changed" / "steps" / "vq" / "reconstruction" / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"psnr": 1.0}))
    for config in (tmp_path / "changed").glob("steps/stages/*/launch/*.*"):
        config.write_text(config.read_text().replace(str(out), str(tmp_path / "changed")))
    quietly(program.main, words(work, tmp_path / "changed", *settings))
    assert results(tmp_path / "changed") != results(alone)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["tokenizers.vq=/nowhere"], r"tokenizers\.vq: /nowhere does not exist"),
        (["tokenizers.vq=WORK/images"], r"tokenizers\.vq: "),
        (["images=/nowhere"], r"/nowhere"),
        (["tokenizers.Vq=WORK/vq"], r"tokenizers\.Vq: a name is made of small letters"),
        (["image_size=10"], r"makes tokens of 4 x 4 pixels, into which 10 pixels cannot be cut"),
        (["image_size=12"], r"image_size: the probe learns whole images, and those of .* have 16 pixels, not 12"),
        (["perturb.neighbours=64"], r"perturb\.neighbours: tokenizers\.vq has 64 codes"),
        (["limit=2"], r"limit: 2 pictures do not show each of the 3 classes once"),
        (["probe.seeds=[1,1]"], r"probe\.seeds: one stands there twice"),
        (["probe.train.seed=1"], r"probe\.train\.seed: is each of seeds in turn"),
        (["probe.train.images=30"], r"must be a multiple of global_batch"),
        (["lpips={trunk: vgg16, weights: /nowhere}"], r"lpips\.weights: /nowhere"),
    ],
)
def test_what_no_step_could_do_is_refused_before_any_runs(work, quick, tmp_path, monkeypatch, settings, sentence):
    monkeypatch.setattr(program.here, "run", lambda graph: pytest.fail("a step was started"))
    filled = [word.replace("WORK", str(work)) for word in settings]
    with pytest.raises(UserError, match=sentence):
        quietly(program.main, words(work, tmp_path / "out", *filled))
    assert not (tmp_path / "out").exists()
    with pytest.raises(pytest.fail.Exception):  # the twin: without the mistake the steps begin
        quietly(program.main, words(work, tmp_path / "out"))


def test_no_probe_without_the_extractor(work, tmp_path, monkeypatch):
    monkeypatch.setattr(program.here, "run", lambda graph: pytest.fail("a step was started"))
    absent = ["inception.package=absent", f"inception.cache={tmp_path}"]
    with pytest.raises(UserError, match=r"probe: no FID without the extractor: .*; or set probe=null"):
        quietly(program.main, words(work, tmp_path / "out", *absent))
    monkeypatch.setattr(program.here, "run", in_this_process)
    said = quietly(program.main, words(work, tmp_path / "out", *absent, "probe=null"))
    assert "Without a probe nothing says which score to trust." in said
    content = results(tmp_path / "out")
    assert "rfid" in content["absent"]
    assert "rfid" not in content["tokenizers"]["vq"]
    assert content["correlations"] == {}


def test_a_rehearsal_scales_the_probe_in_whole_batches():
    shipped = load(ROOT / "configs" / "eval" / "tokenizers.yaml", kind="tokenizers")
    assert isinstance(shipped, TokenizersConfig)
    small = shrink(shipped, 0.013)
    assert small.probe is not None
    assert small.probe.train.images % small.probe.train.global_batch == 0
    assert small.limit == round(0.013 * shipped.limit)
    with pytest.raises(UserError, match="name at least one"):
        build(TokenizersConfig, shipped.model_dump() | {"tokenizers": {}}, "twin")
    uneven = {"train": {"images": 107, "global_batch": 16}, "model": {"size": "GPT-B"}}
    with pytest.raises(UserError, match="multiple of global_batch"):
        build(TokenizersConfig, shipped.model_dump() | {"probe": uneven}, "twin")


@pytest.mark.long
def test_launched_killed_and_launched_again(work, tmp_path, inception_cache, monkeypatch):
    out, cache = tmp_path / "out", f"inception.cache={inception_cache}"
    command = [sys.executable, "-m", "eval.tokenizers", *words(work, out, cache, "probe.seeds=[0]")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    waits_until(lambda: (out / "steps" / "fsq" / "reconstruction").exists(), first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (out / "results.json").exists()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "finished earlier" in again.stdout
    # the others without processes, which only the launcher adds
    monkeypatch.setattr(program.here, "run", in_this_process)
    for name, seed in (("whole", 0), ("other", 1)):
        quietly(program.main, words(work, tmp_path / name, cache, f"probe.seeds=[{seed}]"))
    assert results(out) == results(tmp_path / "whole")
    assert results(out) != results(tmp_path / "other"), "twin: another seed"


def waits_until(over: Callable[[], bool], process: subprocess.Popen) -> None:
    while not over():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
