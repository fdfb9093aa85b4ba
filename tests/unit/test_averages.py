"""Averages of any length from two that were kept: against the true ones, and through ``llamagen convert``."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llamagen_dist.checkpoint import averages
from llamagen_dist.checkpoint.averages import Profile, fit
from llamagen_dist.cli import main
from llamagen_dist.config import load
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT, GPTConfig
from llamagen_dist.parallel import ema
from llamagen_dist.parallel.entries import replicated
from llamagen_dist.parallel.topology import Topology
from tests import checkpoints as store

WIDTHS, BATCH, STEPS, EVERY = (0.05, 0.1), 8, 160, 10
CONFIG = f"""kind: gpt
run_dir: unused
model: {{n_layer: 1, n_head: 2, dim: 8, multiple_of: 16}}
data: {{train: unused, validation: unused}}
train: {{images: {BATCH * STEPS}, global_batch: {BATCH}}}
checkpoint: {{every_images: {BATCH * EVERY}, keep_every_images: {BATCH * EVERY}}}
"""
WANTED = [
    Profile("width", 0.07, STEPS),
    Profile("width", 0.15, STEPS),
    Profile("half_life", 8.0, STEPS),
    Profile("half_life", 16.0, STEPS),
]


def trained(run: Path | None = None) -> tuple[dict[str, np.ndarray], dict[tuple[str, int], dict[str, torch.Tensor]]]:
    """Weights that drift and jitter: all of them, step by step, and the averages that were kept at checkpoints."""
    model = GPT(GPTConfig(1, 2, 8, vocab_size=16, image_tokens=4, num_classes=3, multiple_of=16)).initialize(0)
    powers, random = ema.Powers(WIDTHS, BATCH), torch.Generator().manual_seed(0)
    states = {p: {key: p.detach().clone() for key in powers.keys} for p in model.parameters()}
    path: dict[str, list[np.ndarray]] = {name: [] for name, _ in model.named_parameters()}
    kept = {}
    for step in range(1, STEPS + 1):
        for name, p in model.named_parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=random) + 0.2 / step
            path[name].append(p.detach().double().numpy().copy())
        powers.update(states, (step - 1) * BATCH)
        if step % EVERY:
            continue
        for key in powers.keys:
            kept[key, step] = {name: states[p][key].clone() for name, p in model.named_parameters()}
        if run is not None:
            entries = [replicated("weights", name, p) for name, p in model.named_parameters()]
            entries += [replicated(k, name, states[p][k]) for name, p in model.named_parameters() for k in powers.keys]
            state = {"step": step, "images_seen": step * BATCH}
            text = CONFIG + f"ema: {{widths: {list(WIDTHS)}}}\n"
            store.save(run, step, entries, state, Topology(), config_text=text, keep_last=STEPS)
    return {name: np.stack(steps) for name, steps in path.items()}, kept


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages") / "run"
    return folder, trained(folder)[0]


def apart(made: dict[str, np.ndarray], path: dict[str, np.ndarray], wanted: Profile) -> float:
    """Norm of the difference from the true average of all weights, relative to that average's."""
    true = {name: np.tensordot(wanted.at(0, wanted.step), steps[: wanted.step], 1) for name, steps in path.items()}
    error = sum(float(((made[name] - true[name]) ** 2).sum()) for name in true)
    return (error / sum(float((one**2).sum()) for one in true.values())) ** 0.5


def test_what_training_keeps_is_the_power_functions_average():
    path, kept = trained()
    for (key, step), weights in kept.items():
        width = float(key.removeprefix("ema-"))
        profile = Profile("width", width, step)
        assert profile.at(0, step).sum() == pytest.approx(1)
        assert apart({n: w.numpy() for n, w in weights.items()}, path, profile) < 1e-5, "fp32 against fp64"
        assert apart({n: w.numpy() for n, w in weights.items()}, path, Profile("width", 1.2 * width, step)) > 1e-4


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_a_width_is_the_spread_over_the_training_so_far(width):
    profile, at = Profile("width", width, 20_000).at(0, 20_000), (np.arange(20_000) + 0.5) / 20_000
    assert np.sqrt(profile @ at**2 - (profile @ at) ** 2) == pytest.approx(width, rel=1e-3)
    halved = Profile("half_life", 100.0, 5000).at(0, 5000)
    assert halved[-1] == pytest.approx(2 * halved[-101])


def test_blocks_of_steps_change_nothing(monkeypatch):
    kept = [Profile("width", width, step) for width in WIDTHS for step in range(EVERY, STEPS + 1, EVERY)]
    factors, residual = fit(kept, WANTED[0])
    monkeypatch.setattr(averages, "_BLOCK", 37)
    assert fit(kept, WANTED[0])[1] == pytest.approx(residual, rel=1e-6)
    assert factors.sum() == pytest.approx(1), "what never moved is reproduced"
    assert fit(kept, kept[-1])[1] < 1e-9, "one that was kept is itself"


@pytest.mark.parametrize("wanted", WANTED, ids=lambda p: f"{p.kind} {p.length:g}")
def test_a_made_average_is_the_true_one(run, tmp_path, wanted):
    folder, path = run
    out = tmp_path / "made.safetensors"
    length = ["--width", f"{wanted.length}"] if wanted.kind == "width" else ["--half-life", f"{wanted.length * BATCH}"]
    main(["convert", str(folder), str(out), *length])
    made = {name: tensor.double().numpy() for name, tensor in store.read_weights(out).items()}
    assert apart(made, path, wanted) < 1e-3
    for factor in (0.8, 1.25):  # sabotage twins: the same weights against another profile
        assert apart(made, path, Profile(wanted.kind, wanted.length * factor, STEPS)) > 1e-3


def test_an_average_of_wrongly_placed_checkpoints_is_noticed(run, monkeypatch, tmp_path):
    """Sabotage twin: profiles that lie one checkpoint too early, as a wrong count of steps would have them."""
    folder, path = run
    true = Profile.at
    monkeypatch.setattr(
        Profile, "at", lambda self, a, b: true(Profile(self.kind, self.length, self.step - EVERY + 1), a, b)
    )
    main(["convert", str(folder), str(tmp_path / "made.safetensors"), "--width", "0.15"])
    monkeypatch.undo()
    made = {name: t.double().numpy() for name, t in store.read_weights(tmp_path / "made.safetensors").items()}
    assert apart(made, path, WANTED[1]) > 1e-3


def test_an_earlier_checkpoint_ends_the_average_there(run, tmp_path, capsys):
    folder, path = run
    main(["convert", str(folder / "checkpoints/step_00000080"), str(tmp_path / "made.pt"), "--width", "0.07"])
    said = capsys.readouterr().out
    assert "an average of steps 1 to 80, made of 16 kept ones" in said
    made = {name: tensor.double().numpy() for name, tensor in store.read_weights(tmp_path / "made.pt").items()}
    assert apart(made, path, Profile("width", 0.07, 80)) < 1e-3
    assert apart(made, path, WANTED[0]) > 1e-2, "the twin: not that of the whole run"


def test_what_cannot_be_made_is_refused(run, tmp_path):
    folder, _ = run
    store.save(tmp_path / "plain", 1, [], {"step": 1}, Topology(), config_text=CONFIG)
    for words, sentence in (
        (
            [str(folder), "--width", "0.01"],
            "a width of 0.01 cannot be made from the averages of widths 0.05 and 0.1 at 16",
        ),
        ([str(folder), "--half-life", "8"], r"a half-life of 8 images cannot be made"),
        ([str(folder), "--width", "0.3"], "--width 0.3: give more than 0, at most 0.28"),
        ([str(folder), "--half-life", "0"], "--half-life 0: give more than 0"),
        ([str(folder), "--width", "0.07", "--weights", "ema"], "give one"),
        ([str(tmp_path / "plain"), "--width", "0.07"], "holds no weights"),
    ):
        with pytest.raises(UserError, match=sentence):
            main(["convert", words[0], str(tmp_path / "out.pt"), *words[1:]])
    assert not (tmp_path / "out.pt").exists()


def test_a_run_that_keeps_too_few_checkpoints_is_refused_before_it_starts(tmp_path):
    file = tmp_path / "gpt.yaml"
    file.write_text(CONFIG)
    assert load(file, ["ema.widths=[0.05,0.1]"]).ema.averages == 2
    assert load(file, ["ema.widths=[0.05,0.1]", "ema.decay=0.9"]).ema.averages == 3
    assert load(file).ema.averages == 0
    for words, sentence in (
        (["ema.widths=[0.05,0.1]", "checkpoint.keep_every_images=0"], "keep_every_images to a sixteenth"),
        (["ema.widths=[0.05]"], "give two that differ"),
        (["ema.widths=[0.05,0.05]"], "give two that differ"),
        (["ema.widths=[0.05,0.5]"], "less than or equal to 0.25"),
    ):
        with pytest.raises(UserError, match=sentence):
            load(file, words)
