"""How a tokenizer's training computes: bf16, recomputed activations, channels_last, the compiler, averaged weights."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamagen_dist.config import TokenizerConfigFile, dump
from llamagen_dist.config.section import build
from llamagen_dist.data.batch import ImageBatch
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.perceptual import LPIPS
from llamagen_dist.models.quantizer import Quantizer, VectorQuantizer
from llamagen_dist.models.vq import Block, ResidualBlock, VQModel
from llamagen_dist.parallel import ema
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.sampling.load import load_tokenizer
from llamagen_dist.training.gpt_task import GPTTask
from tests import checkpoints as store
from tests.image_shards import write_images
from tests.random_vgg16 import write_vgg16
from tokenizer_training.task import TokenizerTask

DECAY = 0.7


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 5, 16)


def settings(folder: Path, **parts: Any) -> TokenizerConfigFile:
    return build(TokenizerConfigFile,
        {"kind": "tokenizer", "run_dir": folder / "run",
         "model": {"channels": 8, "channel_multipliers": [1, 2], "res_blocks": 1, "z_channels": 8, "codebook_size": 32,
                   "codebook_dim": 4, **parts.pop("model", {})},
         "data": {"train": folder, "validation": folder, "image_size": 16},
         "loss": {"perceptual": "none", **parts.pop("loss", {}),
                  "discriminator": {"start_images": 0, "channels": 8, "layers": 2, "adaptive_weight": True}},
         "optim": {"lr": 1e-3, "weight_decay": 0, "eps": 1e-4}, "train": {"images": 400, "global_batch": 4},
         **parts}, "test")  # fmt: skip


def make_task(folder: Path, dropout: float = 0.0, **parts: Any) -> TokenizerTask:
    torch.manual_seed(0)
    config = settings(folder, **parts)
    model = VQModel(replace(config.model.vq(), dropout=dropout))
    return TokenizerTask(model, config, Topology(), open_shards(folder))


def images_of(step: int) -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1


def train(task: TokenizerTask, *steps: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(9)  # of the tokenizer's own dropout
    lines = [task.step(ImageBatch(images_of(step), torch.arange(4)), 4 * step) for step in steps]
    return [{name: value.detach().clone() for name, value in line.items()} for line in lines]


def state(task: TokenizerTask) -> dict[str, Tensor]:
    return {f"{entry.group}/{entry.key}": entry.local().clone() for entry in task.entries()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def apart(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> float:
    """The largest difference of what two runs logged, relative where the number is above 0.1."""
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a]
    return max(float((x - y).abs() / x.abs().clamp(min=0.1)) for x, y in pairs)


# --- activation checkpointing ---


def test_recomputed_activations_change_no_bit(shards, monkeypatch):
    calls = 0
    compute = ResidualBlock.compute

    def counted(self: ResidualBlock, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return compute(self, x)

    monkeypatch.setattr(ResidualBlock, "compute", counted)
    found, seen = [], []
    for every in (0, 1, 2):
        calls = 0
        task = make_task(shards, dropout=0.2, compute={"recompute_every": every})
        train(task, 0, 1)
        found.append(state(task))
        seen.append(calls)
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
    blocks = [module for module in task.model.modules() if isinstance(module, Block)]
    assert [block.recompute for block in blocks] == [number % 2 == 0 for number in range(len(blocks))]
    again = sum(isinstance(block, ResidualBlock) and block.recompute for block in blocks)
    assert seen == [seen[0], 2 * seen[0], seen[0] + 2 * again]
    monkeypatch.setattr(ResidualBlock, "random", property(lambda self: False, lambda self, value: None))
    task = make_task(shards, dropout=0.2, compute={"recompute_every": 1})
    train(task, 0, 1)
    assert not equal(found[0], state(task)), "sabotage twin: another dropout mask the second time"


def test_recomputed_blocks_keep_less(shards):
    def kept(every: int) -> int:
        task = make_task(shards, compute={"recompute_every": every})
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            task.model(images_of(0))
        return sum(sizes.values())

    assert kept(1) < 0.6 * kept(0)


# --- channels_last ---


def test_channels_last_is_the_same_up_to_rounding_and_in_checkpoints_not_to_be_seen(shards, tmp_path):
    plain = make_task(shards, ema={"decay": DECAY}, validation={"weights": "ema"})
    task = make_task(shards, ema={"decay": DECAY}, validation={"weights": "ema"}, compute={"channels_last": True})
    outputs = []
    hooks = [m.register_forward_hook(lambda m, given, made: outputs.append(made)) for m in (
        task.model.decoder.mid, task.discriminator.plain.main[3])]  # fmt: skip
    lines, other = train(plain, 0, 1, 2), train(task, 0, 1, 2)
    for hook in hooks:
        hook.remove()
    assert all(made.is_contiguous(memory_format=torch.channels_last) for made in outputs)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in task.model.parameters() if p.dim() == 4)
    assert apart(lines, other) < 1e-4
    assert plain.validate() == pytest.approx(task.validate(), abs=1e-3)  # the weights are equal to rounding
    with torch.no_grad():
        task.model.decoder.mid[0].conv1.weight[0, 0, 0, 0] += 0.1
    assert apart(train(plain, 3), train(task, 3)) > 1e-4, "sabotage twin: one weight of 60,000"

    saved = store.save(tmp_path / "run", 3, task.entries(), {}, Topology(), config_text=dump(task.config))
    again = make_task(shards, ema={"decay": DECAY}, validation={"weights": "ema"})
    store.restore(saved, again.entries())
    assert equal(state(task), state(again))


# --- bf16 ---


class Types:
    """Which types go through the modules of a task."""

    def __init__(self, task: TokenizerTask) -> None:
        self.seen: dict[str, set[torch.dtype]] = {}
        modules: dict[str, nn.Module] = {
            "encoder": task.model.encoder.conv_out,
            "decoder": task.model.decoder.conv_out,
            "discriminator": task.discriminator.plain.main[0],
            "quantizer": task.model.quantize,
        }
        for name, module in modules.items():
            module.register_forward_hook(lambda m, given, made, name=name: self.note(name, made))

    def note(self, name: str, made: Any) -> None:
        made = made[0] if isinstance(made, tuple) else made
        self.seen.setdefault(name, set()).add(made.dtype)


def test_bf16_rounds_the_networks_and_nothing_else(shards):
    plain, task = make_task(shards), make_task(shards, compute={"precision": "bf16"})
    types = Types(task)
    lines = train(task, 0, 1, 2)
    assert types.seen == {name: {torch.bfloat16} for name in ("encoder", "decoder", "discriminator")} | {
        "quantizer": {torch.float32}
    }
    assert {value.dtype for line in lines for value in line.values()} == {torch.float32}
    assert {tensor.dtype for tensor in state(task).values() if tensor.is_floating_point()} == {torch.float32}
    assert 0 < abs(float(lines[2]["reconstruction"] / train(plain, 0, 1, 2)[2]["reconstruction"]) - 1) < 2e-2
    assert plain.describe()["precision"] == "fp32"
    assert task.describe()["precision"] == "bf16"
    types.seen.clear()
    task.validate()
    assert types.seen == {name: {torch.float32} for name in ("encoder", "decoder", "quantizer")}
    wrong = make_task(shards, compute={"precision": "bf16"})
    wrong.rounded = False
    types = Types(wrong)
    train(wrong, 0)
    assert types.seen["encoder"] == {torch.float32}, "sabotage twin"


def test_a_bf16_run_resumes_to_the_last_bit_with_its_average(shards, tmp_path):
    parts: dict[str, Any] = {"compute": {"precision": "bf16"}, "ema": {"decay": DECAY}}
    task = make_task(shards, **parts)
    train(task, 0, 1)
    saved = store.save(tmp_path / "run", 2, task.entries(), {}, Topology(), config_text=dump(task.config))
    scalars = dict(task.scalars())
    train(task, 2, 3)
    for lost in (None, "encoder.conv_in.weight"):
        again = make_task(shards, **parts)
        store.restore(saved, [e for e in again.entries() if (e.group, e.key) != ("ema", lost)])
        again.load_scalars(scalars)
        train(again, 2, 3)
        assert equal(state(task), state(again)) == (lost is None), "without it: the sabotage twin"


def test_lpips_in_bf16_rounds_its_features_and_not_its_distances(tmp_path):
    lpips = LPIPS("vgg16", write_vgg16(tmp_path / "vgg16.pth"), "key", "leave it out")
    torch.manual_seed(0)
    images, other = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    inside: list[torch.dtype] = []
    lpips.features.net.slice5.register_forward_hook(lambda m, given, made: inside.append(made.dtype))
    between: list[torch.dtype] = []
    lpips.network.lins[0].register_forward_hook(lambda m, given, made: between.append(made.dtype))
    exact = lpips(other, images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = lpips(other.bfloat16(), images)
        careless = lpips.network.lins[0](torch.rand(1, 64, 8, 8))
    again = lpips(other, images)
    assert inside == [torch.float32] * 2 + [torch.bfloat16] * 2 + [torch.float32] * 2
    assert between[:2] + between[3:] == [torch.float32] * 3
    assert careless.dtype == torch.bfloat16, "sabotage twin: autocast that is left on rounds them"
    assert torch.equal(again, exact)
    assert 0 < abs(float(rounded / exact) - 1) < 2e-2


@pytest.mark.parametrize("kind", ["vq", "ema", "ibq", "fsq", "ifsq", "lfq"])
def test_every_quantizer_is_fp32_under_autocast(shards, kind, monkeypatch):
    options = {"levels": [4, 4, 2]} if kind in ("fsq", "ifsq") else {}
    model = {"quantizer": kind, "codebook_dim": {"fsq": 3, "ifsq": 3, "lfq": 5}.get(kind, 4), **options}
    quantizer: Quantizer = make_task(shards, model=model).model.quantize
    latents = torch.randn(4, quantizer.codebook_dim, 8, 8).bfloat16()
    entropy = "entropy" in quantizer.losses

    def found() -> list[Tensor]:
        quantised, losses, codes = quantizer(latents, entropy=entropy)
        terms = [loss for loss in losses if loss is not None]
        return [quantised, *terms, codes, quantizer.neighbours(torch.arange(32), 5)]

    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        cast = found()
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
    assert {one.dtype for one in cast} == {torch.float32, torch.int64}
    if kind == "vq":
        monkeypatch.setattr(VectorQuantizer, "codes_as_vectors", lambda self: self.embedding.weight.bfloat16().float())
        assert not torch.equal(found()[0], plain[0]), "sabotage twin: codes rounded to bf16"


# --- averaged weights ---


def average_by_hand(task: TokenizerTask, *steps: int) -> dict[str, Tensor]:
    """Of every parameter, also those that no gradient moves, over steps that move no code elsewhere."""
    own = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    for step in steps:
        train(task, step)
        for name, p in task.model.named_parameters():
            own[name] = DECAY * own[name] + (1 - DECAY) * p.detach()
    return own


@pytest.mark.parametrize("kind", ["vq", "ema"])
def test_the_average_is_of_all_weights_and_of_the_codebook(shards, kind):
    task = make_task(shards, model={"quantizer": kind, "codebook_decay": 0.5}, ema={"decay": DECAY})
    own = average_by_hand(task, 0, 1, 2)
    averages = {name.removeprefix("ema/"): value for name, value in state(task).items() if name.startswith("ema/")}
    assert averages.keys() == {name.removeprefix("weights/") for name in state(task) if name.startswith("weights/")}
    assert all(torch.allclose(averages[name], value, atol=1e-6) for name, value in own.items())
    table = "quantize.embedding.weight"
    assert not torch.allclose(averages[table], task.model.state_dict()[table], atol=1e-4), "else nothing is shown"


@pytest.mark.parametrize("kind", ["vq", "ema"])
def test_codes_that_move_elsewhere_take_their_average_along(shards, kind):
    parts: dict[str, Any] = {"codebook": {"revive_after_steps": 2}, "ema": {"decay": DECAY}}
    task = make_task(shards, model={"quantizer": kind, "codebook_size": 256}, **parts)
    table = task.model.quantize.embedding.weight
    average = task.generator.optimizer.state[table][ema.KEY]
    task._start_codebook(images_of(0))
    assert torch.equal(average, table)
    moved: list[Tensor] = []
    revive = task.codebook.revive
    task.codebook.revive = lambda *given: moved.append(revive(*given)) or moved[-1]  # type: ignore[method-assign]
    train(task, 1)
    (codes,) = moved
    assert 0 < len(codes) < 256
    assert torch.equal(average[codes], table[codes])
    stay = torch.ones(256, dtype=torch.bool).index_fill_(0, codes, False)
    assert not torch.equal(average[stay], table[stay]), "sabotage twin: codes that stay have a past"


def test_whoever_opens_a_run_gets_the_average_it_names(shards, tmp_path):
    """Validation of the average, and the run opened by name or by the sha256 that tokens carry, agree."""
    task = make_task(shards, ema={"decay": DECAY}, validation={"weights": "ema"})
    train(task, 0, 1, 2)
    before, found, shown = state(task), task.validate(), task.pictures(2)["reconstructions"]
    assert equal(before, state(task)), "validation changes nothing"
    run = tmp_path / "run"
    store.save(run, 3, task.entries(), {}, Topology(), config_text=dump(task.config))
    trained, average = load_tokenizer(run), load_tokenizer(run, weights="ema")
    assert trained.sha256 != average.sha256
    assert load_tokenizer(run, made=average.sha256).sha256 == average.sha256
    assert load_tokenizer(run, made=trained.sha256).sha256 == trained.sha256
    assert load_tokenizer(run, made="0" * 64).sha256 == trained.sha256  # for the caller to refuse
    scores = {}
    for name, opened in (("trained", trained), ("ema", average)):
        task.model.load_state_dict(opened.model.state_dict())
        task._validated = torch.no_grad  # type: ignore[method-assign]  # the weights as they stand
        scores[name] = task.validate(), task.pictures(2)["reconstructions"]
    assert scores["ema"][0] == pytest.approx(found, abs=1e-6)
    assert torch.equal(scores["ema"][1], shown)
    assert scores["trained"][0] != pytest.approx(found, abs=1e-6), "sabotage twin: the trained weights"


def refused(work: Callable[[], object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        work()


def test_an_average_that_is_not_there_is_refused(shards, tmp_path):
    refused(lambda: settings(shards, validation={"weights": "ema"}), "ema.decay: validation.weights asks for")
    widths = {"ema": {"widths": [0.05, 0.1]}, "checkpoint": {"every_images": 8, "keep_every_images": 8}}
    refused(lambda: settings(shards, **widths), "ema.widths: is of a GPT's training")
    task = make_task(shards)
    store.save(tmp_path / "run", 0, task.entries(), {}, Topology(), config_text=dump(task.config))
    refused(lambda: load_tokenizer(tmp_path / "run", weights="ema"), "holds no ema.*trained without")
    assert load_tokenizer(tmp_path / "run", weights="trained").image_size == 16  # the twin: what is there opens


# --- out of memory ---


def test_out_of_memory_names_settings_that_the_program_has():
    """A tokenizer has no parallel.zero to raise: the twin finds that the GPT's advice would be refused."""

    def refused(advice: str) -> list[str]:
        keys = re.findall(r"[a-z]+\.[a-z_]+", advice)
        assert len(keys) >= 3
        sections = {name: field.annotation for name, field in TokenizerConfigFile.model_fields.items()}
        return [key for key in keys if key.split(".")[1] not in sections[key.split(".")[0]].model_fields]

    assert refused(TokenizerTask.smaller) == []
    assert "parallel.zero" in GPTTask.smaller
    make_config = {"kind": "tokenizer", "run_dir": "x", "data": {"train": "a", "validation": "b", "image_size": 16}}
    with pytest.raises(UserError, match="zero"):
        build(TokenizerConfigFile, {**make_config, "parallel": {"zero": 1}}, "config")


# --- the compiler ---


@pytest.mark.long  # it takes a minute
def test_compiled_halves_compute_the_same(shards):
    torch.compiler.reset()
    plain = make_task(shards, compute={"recompute_every": 2})
    task = make_task(shards, compute={"recompute_every": 2, "compile": True})
    assert state(task).keys() == state(plain).keys()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    lines = train(task, 0, 1, 2)
    assert stats["unique_graphs"] == 2
    task.validate()
    assert stats["unique_graphs"] == 2, "validation is not compiled"
    assert apart(train(plain, 0, 1, 2), lines) < 1e-4
    with torch.no_grad():
        task.model.encoder.mid[0].conv1.weight[0, 0, 0, 0] += 0.1
    assert apart(train(plain, 3), train(task, 3)) > 1e-4, "sabotage twin: one weight"
