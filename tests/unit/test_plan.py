"""What a run costs before it exists: counts, FLOPs, layouts, and what ``llamagen plan`` says about them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamagen_dist import cli
from llamagen_dist.config import GPTConfigFile, TrainSection, load
from llamagen_dist.data.manifest import Manifest, write_manifest
from llamagen_dist.errors import UserError
from llamagen_dist.models.cost import forward_flops, parameters, total_parameters, training_flops_per_image
from llamagen_dist.models.gpt import GPT
from llamagen_dist.models.sizes import GPT_SIZES, GPTConfig
from llamagen_dist.parallel.division import check_split, data_ranks, divide_batch
from llamagen_dist.parallel.tensor_parallel import cut
from llamagen_dist.planning import layouts, memory
from llamagen_dist.planning.plan import Machine, Tokens, answer, memory_lines, model_of
from llamagen_dist.tracking.devices import DEVICES, GIB, named, peak_flops

ROOT = Path(__file__).parent.parent.parent
SHAPES = [
    GPTConfig(n_layer=3, n_head=8, dim=64, vocab_size=96, image_tokens=16, num_classes=10, multiple_of=16),
    GPTConfig(n_layer=2, n_head=4, dim=32, vocab_size=64, image_tokens=16, condition="text", multiple_of=8),
]
NEW = replace(SHAPES[0], order="rar", guidance="free")


def meta(config: GPTConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(GPT(config).named_parameters())


GROUP_OF = {
    "cls_embedding": "condition embedding",
    "tok_embeddings": "token embedding",
    "wqkv": "attention",
    "wo": "attention",
    "w1": "feed-forward",
    "w2": "feed-forward",
    "w3": "feed-forward",
    "attention_norm": "norms",
    "ffn_norm": "norms",
    "norm": "norms",
    "target_positions": "target positions",
    "beta_embedding": "beta embedding",
    "output": "head",
}


@pytest.mark.parametrize("config", [*SHAPES, NEW], ids=["class", "text", "rar and free"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_group_and_its_share_are_those_of_the_real_model(config, tensor):
    counted = dict.fromkeys(parameters(config), 0)
    for name, p in meta(config).items():
        group = next(GROUP_OF[word] for word in name.split(".") if word in GROUP_OF)
        counted[group] += cut(name, p, tensor, tensor - 1).numel()
    assert parameters(config, tensor) == counted


@pytest.mark.parametrize(
    ("size", "tokens", "expected"),
    [
        # closed form of facts checked elsewhere: T = prefix + N - 1 positions, T (T + 1) / 2 pairs, head at N
        ("GPT-B", 256, 1.5343e11),
        ("GPT-L", 256, 5.0899e11),
        ("GPT-XL", 256, 1.1738e12),
        ("GPT-XXL", 256, 2.1551e12),
        ("GPT-3B", 256, 4.7011e12),
        ("GPT-B", 576, 3.5540e11),
        ("GPT-L", 576, 1.1724e12),
        ("GPT-XL", 576, 2.6920e12),
        ("GPT-XXL", 576, 4.9305e12),
        ("GPT-3B", 576, 1.0662e13),
    ],
)
def test_flops_per_image_are_the_known_ones(size, tokens, expected):
    config = GPTConfig(**GPT_SIZES[size], image_tokens=tokens)
    assert training_flops_per_image(config) == pytest.approx(expected, rel=1e-4)
    assert forward_flops(config, dense=True)["attention"] > 1.9 * forward_flops(config)["attention"]


def test_flops_of_a_text_model_count_its_long_prefix():
    config = GPTConfig(**GPT_SIZES["GPT-XL"], condition="text")
    assert training_flops_per_image(config) == pytest.approx(1.7168e12, rel=1e-4)


def test_guidance_free_training_counts_its_null_pass():
    plain, free = SHAPES[0], replace(SHAPES[0], guidance="free")
    assert 3 * training_flops_per_image(free) == 4 * training_flops_per_image(plain)
    assert training_flops_per_image(replace(plain, order="rar")) == training_flops_per_image(plain)


def test_flops_are_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(SHAPES[0], token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)
    model = GPT(config)
    # its count of the fused kernel depends on the device; that of plain products does not
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert counter.get_total_flops() == sum(forward_flops(config, dense=True).values())


# --- layouts ---


def gpt(*settings: str) -> GPTConfigFile:
    config = load(ROOT / "configs" / "gpt" / "GPT-L.yaml", list(settings))
    assert isinstance(config, GPTConfigFile)
    return config


def planned(*settings: str, gpus: int = 8, gpu: str = "A100-80", per_node: int = 8) -> dict:
    return answer(gpt(*settings), Tokens(), Machine(named(gpu), gpus, per_node))


def test_what_plan_refuses_is_what_the_split_refuses():
    for config in [*SHAPES, *(GPTConfig(**size) for size in GPT_SIZES.values())]:
        for tensor in (1, 2, 3, 4, 5, 6, 8, 16, 32):
            try:
                check_split(config, tensor)
                refused = False
            except UserError:
                refused = True
            listed = any(layout.tensor == tensor for layout in layouts.possible(config, gpt(), tensor)[0])
            assert listed != refused, (config, tensor)


@given(st.integers(1, 512), st.integers(1, 16), st.integers(1, 4), st.none() | st.integers(1, 64))
def test_a_batch_is_divided_without_a_rest_or_refused(batch, ranks, tensor, micro):
    train = TrainSection(images=batch, global_batch=batch, micro_batch=micro)
    right = ranks % tensor == 0 and batch % (ranks // tensor) == 0
    right = right and (micro is None or batch // (ranks // tensor) % micro == 0)
    try:
        data = data_ranks(ranks, tensor)
        found = divide_batch(train, data)
    except UserError:
        assert not right
        return
    assert right
    assert data * tensor == ranks
    assert found.micro * found.accumulation * data == batch


def test_every_layout_of_the_gpus_is_listed_or_refused_with_a_reason():
    found = planned("train.global_batch=192", "train.images=19200", "compute.precision=fp32", gpus=12)
    listed = {(row["zero"], row["tensor"], row["data"]) for row in found["layouts"]}
    assert listed == {(zero, tensor, 12 // tensor) for zero in range(4) for tensor in (1, 2, 4)}
    refused = {one["layout"]: one["reason"] for one in found["refused"]}
    assert "heads 16" in refused["TP 3, any ZeRO"]
    assert all(sum(row["bytes"].values()) == row["total_bytes"] for row in found["layouts"])
    batch = planned("train.global_batch=100", "train.images=10000", gpus=8)
    reason = next(one["reason"] for one in batch["refused"] if "TP 1," in one["layout"])
    assert "8 data-parallel ranks; use 5 data-parallel ranks" in reason


def test_bf16_without_masters_is_refused():
    found = planned("compute.precision=bf16")
    assert {row["zero"] for row in found["layouts"]} == {1, 2, 3}
    assert any("masters" in one["reason"] for one in found["refused"])


def test_state_falls_with_every_stage_and_more_ranks():
    model = GPTConfig(**GPT_SIZES["GPT-XL"])

    def held(zero: int, data: int) -> int:
        return sum(memory.state(model, memory.Layout(zero=zero, data=data, precision="bf16")).values())

    assert held(1, 8) > held(2, 8) > held(3, 8)
    assert held(3, 2) > held(3, 4) > held(3, 8)
    assert held(3, 8) == pytest.approx(total_parameters(model) * (2 + 4 + 12) / 8, rel=0.01)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config, model = gpt("model.size=GPT-3B", "compute.precision=bf16"), GPTConfig(**GPT_SIZES["GPT-3B"])
    room = DEVICES["A100-40"].memory
    for row in planned("model.size=GPT-3B", "compute.precision=bf16", gpu="A100-40")["layouts"]:
        share = config.train.global_batch // row["data"]
        for name, every in layouts.POLICIES.items():
            layout = layouts.at(config, row["zero"], row["tensor"], row["data"], 1)
            best = row["largest_micro"][name]
            sizes = {
                n: layouts.fits(model, replace(layout, micro=n, recompute_every=every), room)
                for n in layouts.divisors(share)
            }
            assert best == max((n for n, fits in sizes.items() if fits), default=0)


# --- recommendation and warnings ---


def test_a_config_that_fits_needs_no_change():
    found = planned("compute.precision=bf16")
    assert found["recommendation"]["settings"] == {}
    assert found["configured"]["fits"]


@pytest.mark.parametrize("gpu", ["A100-40", "custom:24:100", "custom:12:100"])
def test_the_recommended_change_fits_and_nothing_in_it_is_superfluous(gpu):
    settings = ["model.size=GPT-3B", "compute.precision=bf16", "train.micro_batch=32"]
    before = planned(*settings, gpu=gpu)
    assert not before["configured"]["fits"]
    changed = before["recommendation"]["settings"]
    assert changed
    words = [f"{key}={value}" for key, value in changed.items()]
    assert planned(*settings, *words, gpu=gpu)["configured"]["fits"]
    for left_out in words:
        rest = [word for word in words if word != left_out]
        after = planned(*settings, *rest, gpu=gpu)["configured"]
        assert "refused" in after or not after["fits"], left_out


def test_nothing_fits_says_what_would():
    found = planned("model.size=GPT-7B", "compute.precision=bf16", gpus=2, gpu="custom:16:100")
    assert found["recommendation"]["settings"] is None
    assert "of them would do" in found["recommendation"]["text"]


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (["parallel.tensor=16", "model.size=GPT-3B"], {"gpus": 16, "per_node": 8}, "reaches across nodes"),
        (["train.micro_batch=1"], {}, "micro-batch 1"),
        (["parallel.tensor=2"], {}, "fits without it"),
        (["parallel.zero=3"], {}, "ZeRO-1 fits too"),
        (["compute.recompute_every=1"], {}, "it fits without"),
        (["compute.precision=fp32"], {}, "16 x the peak rate"),
        (["model.size=GPT-3B", "validation.batch=4096"], {}, "set a smaller one"),
    ],
)
def test_odd_layouts_are_remarked_upon(settings, options, words):
    base = ["compute.precision=bf16", "train.micro_batch=8"]
    assert not any(words in text for text in planned(*base)["warnings"])
    assert any(words in text for text in planned(*base, *settings, **options)["warnings"])


def test_the_table_for_an_out_of_memory_message_adds_up():
    config = gpt("compute.precision=bf16", "ema.decay=0.9999", "parallel.zero=2")
    model, _, _ = model_of(config, Tokens())
    lines = memory_lines(model, config, ranks=8, micro=32)
    sizes = [float(line.split()[1]) for line in lines[1:]]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.06)
    assert "ZeRO-2, TP 1, DP 8, bf16" in lines[0]
    assert lines[1].split()[0] == "weights"
    assert sizes[0] == pytest.approx(total_parameters(model) * 2 / GIB, abs=0.01)


# --- the command ---


def test_the_command_needs_no_data_and_no_torch_and_little_time():
    code = (
        "import sys, time; from llamagen_dist import cli; "
        "cli.main(['plan', 'configs/gpt/GPT-3B.yaml', '--gpus', '32', '--json']); "
        "print(time.process_time(), 'torch' in sys.modules, file=sys.stderr)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, torch_loaded = out.stderr.split()[-2:]
    assert torch_loaded == "False"
    assert float(seconds) < 1, "CPU seconds, whatever else the machine does"
    found = json.loads(out.stdout)
    assert found["parameters"]["total"] == 3_096_659_200
    assert found["time"]["gpu_hours"] == pytest.approx(found["run"]["training_flops"] / (0.4 * 312e12 * 3600))
    assert found["machine"]["mfu_is"] == "assumed"


def test_the_text_names_every_part(capsys):
    cli.main(
        [
            "plan",
            str(ROOT / "configs/gpt/GPT-3B.yaml"),
            "--gpu",
            "h100",
            "--nodes",
            "4",
            "--mfu",
            "0.5",
            "ema.decay=0.9999",
        ]
    )
    text = capsys.readouterr().out
    for words in ("3,096,659,200", "32 x H100", "50 % MFU (given)", "EMA", "not verified here", "assumed:", "=> "):
        assert words in text, words
    assert max(len(line) for line in text.splitlines()) <= 110


def test_sizes_come_from_the_shards_where_they_are(tmp_path, capsys):
    folder = tmp_path / "train"
    folder.mkdir()
    shards = Manifest("tokens", 0, (".codes.npy",), (), classes=["a", "b"], vocab_size=512, grid=(4, 4))
    write_manifest(folder, shards)
    words = ["plan", str(ROOT / "configs/gpt/GPT-B.yaml"), "--json", f"data.train={folder}"]
    cli.main(words)
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert (tokens["vocab_size"], tokens["per_image"], tokens["classes"]) == (512, 16, 2)
    assert "read from" in tokens["source"]
    cli.main([*words, "--tokens", "576"])
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert (tokens["vocab_size"], tokens["per_image"]) == (512, 576)
    assert "per image as given" in tokens["source"]
    write_manifest(folder, replace(shards, classes=None))  # a thousand classes were taken for read from there
    with pytest.raises(UserError, match="needs labels, and the token shards have none"):
        cli.main(words)
    write_manifest(folder, Manifest("images", 0, (".png",), ()))
    with pytest.raises(UserError, match="holds images, not tokens"):
        cli.main(words)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a shard manifest"):
        cli.main(words)


def test_a_ladder_is_planned_by_its_largest_rung(capsys):
    cli.main(["plan", str(ROOT / "configs/gpt/ladder.yaml"), "--json", "--gpus", "2", "--tokens", "49"])
    found = json.loads(capsys.readouterr().out)
    assert (found["rung"], found["model"]["dim"]) == ("g390k", 80)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "H10"], "did you mean H100"),
        (["--gpu", "custom:80"], "custom:MEMORY_GIB:PEAK_TFLOPS"),
        (["--gpu", "custom:-1:3"], "two positive numbers"),
        (["--gpus", "7"], "7 GPUs allow no layout"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "8", "--nodes", "2"], "do not agree"),
        (["--mfu", "40"], "at most 1"),
        (["--mfu", "0"], "--mfu 0: give more than 0"),
        (["--write-rate", "nan"], "--write-rate nan: give more than 0"),
        (["--tokens", "0"], "--tokens 0"),
        (["--tokens", "255"], "not a square"),
        (["model.size=GPT-4B"], "did you mean"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        cli.main(["plan", str(ROOT / "configs/gpt/GPT-3B.yaml"), *words])
    assert "\n" not in str(caught.value)


def test_other_kinds_are_refused():
    with pytest.raises(UserError, match="kind tokenizer"):
        cli.main(["plan", str(ROOT / "configs/tokenizer/quickstart.yaml")])


def test_peak_rates_are_known_by_name_or_not_at_all():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA H200", "bf16") == 989.4e12
    for unknown in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090", "cpu"):
        assert peak_flops(unknown, "bf16") is None
