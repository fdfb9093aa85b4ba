"""Layouts against one plain process: the same losses and gradient norms, bytes per rank as the layout says."""

from typing import Any

import pytest
import torch

from llamagen_dist.build import gpt_config
from llamagen_dist.errors import UserError
from llamagen_dist.models.gpt import GPT
from llamagen_dist.parallel.tensor_parallel import TABLE, cut, merge, split_of
from llamagen_dist.training.gpt_task import GPTTask
from llamagen_dist.training.guards import NonFiniteError
from tests.plain_gpt import whole_gpt
from tests.ranks.forked import run_ranks
from tests.ranks.layouts import (
    BATCH,
    CLASSES,
    SERIAL,
    STEPS,
    TOKENS,
    TOLERANCE,
    VOCABULARY,
    Layout,
    config,
    make_task,
    mostly_long,
    steps,
    train,
    worst,
)

MATRIX = [Layout(r, t, zero) for r, t in [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)] for zero in range(4)]
ODD = [Layout(3, 1, 1), Layout(3, 1, 3)]  # sizes that three ranks cannot share evenly
SEQUENCE = [Layout(2, 2, 0, True), Layout(2, 2, 2, True), Layout(4, 2, 1, True), Layout(4, 4, 3, True)]
QUICK = [Layout(2, 1, 0), Layout(2, 1, 1), Layout(2, 1, 3), Layout(2, 2, 2), Layout(3, 1, 1), Layout(2, 2, 2, True)]
QUICK += [Layout(4, 2, 3)]


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    return run_ranks(train, 1, SERIAL)[0]


@pytest.mark.parametrize("layout", mostly_long(*MATRIX[1:], *ODD, *SEQUENCE, quick=QUICK))
def test_every_layout_equals_one_plain_process(serial, layout):
    """Dropout is on (0.1 everywhere): its masks follow the samples, not the ranks."""
    results = run_ranks(train, layout.ranks, layout)
    assert max(norm for _, norm in serial["losses"]) > 0.5, "clipping must be active for the norms to matter"
    for result in results:
        assert worst(result["losses"], serial["losses"]) < TOLERANCE
        for key, value in serial["validation"].items():
            assert abs(result["validation"][key] - value) < TOLERANCE
        check_bytes(result["bytes"], layout)
        assert result["replicas"] == results[0]["replicas"], "copies of a weight must stay equal to the last bit"
    assert {(r["dp_rank"], r["tp_rank"]) for r in results} == {
        (d, t) for d in range(layout.ranks // layout.tensor) for t in range(layout.tensor)
    }


def tiny() -> GPT:
    return whole_gpt(
        gpt_config(config(SERIAL).model, vocab_size=VOCABULARY, image_tokens=TOKENS, num_classes=CLASSES), 0
    )


def check_bytes(held: dict[str, int], layout: Layout) -> None:
    """fp32: weights whole up to ZeRO-2, shared out at ZeRO-3; masters and moments shared out from ZeRO-1 on."""
    dp = layout.ranks // layout.tensor
    parts = {n: p.nbytes // (layout.tensor if split_of(n) else 1) for n, p in tiny().named_parameters()}
    own, vectors = sum(parts.values()), sum(size for n, size in parts.items() if n.endswith("norm.weight"))
    shared = own / dp if layout.zero else own
    slack = 4096  # every rank's share is padded to the same length
    assert shared * 2 <= held["moments"] <= shared * 2 + slack
    assert held["masters"] == 0 if layout.zero == 0 else shared <= held["masters"] <= shared + slack
    if layout.zero == 3 and dp > 1:
        assert own / dp <= held["weights"] <= own / dp + vectors + slack
    else:
        assert own <= held["weights"] <= own + slack
    assert held["gradients"] == held["ema"] == 0


@pytest.mark.long
def test_other_models_split_alike():
    """Grouped-query attention and captions under the layouts that cut them differently."""
    for settings in (("model.n_kv_head=2",), ("model.condition=text", "model.prefix_tokens=5")):
        plain = run_ranks(train, 1, SERIAL, *settings)[0]
        for layout in (Layout(2, 2, 1), Layout(2, 2, 0, True), Layout(4, 2, 3)):
            for result in run_ranks(train, layout.ranks, layout, *settings):
                assert worst(result["losses"], plain["losses"]) < TOLERANCE, (settings, layout)
                assert abs(result["validation"]["val_loss"] - plain["validation"]["val_loss"]) < TOLERANCE


def first_steps(layout: Layout, whole: bool) -> list[tuple[float, float]]:
    return steps(make_task(layout, whole=whole), 0, 3)


def test_a_model_that_was_never_whole_equals_one_that_was():
    """Pieces drawn by name on the way to their rank, against a model built with all its weights and then cut."""
    for layout in (SERIAL, Layout(2, 2, 1), Layout(2, 1, 3)):
        pieces, whole = (run_ranks(first_steps, layout.ranks, layout, whole)[0] for whole in (False, True))
        assert pieces == whole, layout


SWITCHES = ("model.qk_norm=true", "model.n_kv_head=2", "model.z_loss=0.02", "optim.clip=5")


@pytest.fixture(scope="module")
def switched() -> dict[str, Any]:
    return run_ranks(train, 1, SERIAL, *SWITCHES)[0]


@pytest.mark.parametrize(
    "layout",
    mostly_long(
        *(Layout(2, 1, 0), Layout(2, 2, 0), Layout(4, 2, 2), Layout(2, 2, 0, True), Layout(4, 2, 3)),
        Layout(2, 2, 3, True),
        Layout(2, 1, 3),
        quick=[Layout(2, 2, 0, True), Layout(2, 1, 3)],
    ),
)
def test_the_norms_of_q_and_k_and_the_z_loss_split_alike(serial, switched, layout):
    """Norms see their rank's heads only, the log-partition its rank's part of the vocabulary."""
    assert worst(switched["losses"], serial["losses"]) > 100 * TOLERANCE, "they must be on"
    results = run_ranks(train, layout.ranks, layout, *SWITCHES, "compute.recompute_every=1", "train.micro_batch=3")
    for result in results:
        assert worst(result["losses"], switched["losses"]) < TOLERANCE
        assert worst(result["z"], switched["z"]) < 100 * TOLERANCE, "squares of numbers near 5, summed in fp32"
        assert abs(result["validation"]["val_loss"] - switched["validation"]["val_loss"]) < TOLERANCE
        assert result["replicas"] == results[0]["replicas"], "copies of a weight must stay equal to the last bit"


def train_without_the_other_ranks(what: str) -> dict[str, list[tuple[float, ...]]]:
    task, squares = make_task(Layout(2, 2, 0), *SWITCHES), []
    if what == "losses":
        for layer in task.model.layers:
            layer.attention.q_norm.weight._backward_hooks.clear()
    else:
        task.model.log_partition = lambda logits: logits.clone().logsumexp(-1)
    return {"losses": steps(task, 0, STEPS, squares=squares), "z": squares}


@pytest.mark.parametrize("what", ["losses", "z"])
def test_a_switch_that_forgets_the_other_ranks_is_noticed(switched, what):
    """Norms that sum only their own heads' gradients; a log-partition of a part of the vocabulary."""
    found = run_ranks(train_without_the_other_ranks, 2, what)[0]
    assert worst(found[what], switched[what]) > (20 if what == "losses" else 10_000) * TOLERANCE


@pytest.mark.long
def test_eight_ways_where_the_heads_allow_it():
    settings = ("model.n_head=8",)
    plain = run_ranks(train, 1, SERIAL, *settings)[0]
    for result in run_ranks(train, 8, Layout(8, 8, 1), *settings):
        assert worst(result["losses"], plain["losses"]) < TOLERANCE


@pytest.mark.long
def test_accumulation_recomputation_and_attention_dropout_change_nothing(serial):
    dropped = run_ranks(train, 1, SERIAL, "model.attn_dropout_p=0.2")[0]
    assert worst(dropped["losses"], serial["losses"]) > 100 * TOLERANCE, "the dropout must be on"
    for layout in (SERIAL, Layout(2, 1, 0), Layout(2, 1, 2), Layout(2, 2, 1, True), Layout(2, 1, 3)):
        found = run_ranks(train, layout.ranks, layout, "train.micro_batch=2", "compute.recompute_every=1")[0]
        assert worst(found["losses"], serial["losses"]) < TOLERANCE, layout
    found = run_ranks(train, 2, Layout(2, 2, 1), "model.attn_dropout_p=0.2")[0]
    assert worst(found["losses"], dropped["losses"]) < TOLERANCE, "heads drop by their global number"


# --- sabotage: each of these breaks one thing on purpose, and the comparison above must notice ---


def train_with_the_wrong_share() -> list[tuple[float, float]]:
    task = make_task(Layout(2, 1, 1))
    return steps(task, 0, STEPS, shift=BATCH * task.topology.dp_rank)


def train_without_the_data_parallel_reduce() -> list[tuple[float, float]]:
    task = make_task(Layout(2, 1, 0))
    with task.engine.module.no_sync():
        return steps(task, 0, STEPS)


def train_without_the_row_reduce() -> list[tuple[float, float]]:
    task = make_task(Layout(2, 2, 1))
    row = task.model.layers[0].attention.wo
    row.forward = lambda x: torch.nn.functional.linear(x, row.weight)
    return steps(task, 0, STEPS)


def train_with_unmarked_splits() -> list[tuple[float, float]]:
    task = make_task(Layout(2, 2, 1))
    for p in task.model.parameters():
        if hasattr(p, "tensor_model_parallel"):
            p.tensor_model_parallel = False
    assert task.config.optim.clip > 0
    return steps(task, 0, STEPS)


def train_without_the_shared_input_reduce() -> list[tuple[float, float]]:
    task = make_task(Layout(2, 2, 0))
    task.model.layers[1].ffn_norm._forward_hooks.clear()
    return steps(task, 0, STEPS)


def train_with_masks_of_the_wrong_positions() -> list[tuple[float, float]]:
    from llamagen_dist.models import dropout

    dropout.Randomness.at = lambda self, first: self
    return steps(make_task(Layout(2, 2, 1, True)), 0, STEPS)


@pytest.mark.parametrize(
    "broken",
    [
        train_with_the_wrong_share,
        train_without_the_data_parallel_reduce,
        train_without_the_row_reduce,
        train_with_unmarked_splits,
        train_without_the_shared_input_reduce,
        train_with_masks_of_the_wrong_positions,
    ],
)
def test_a_broken_layout_is_noticed(serial, broken):
    assert worst(run_ranks(broken, 2)[0], serial["losses"]) > 20 * TOLERANCE


def replicas_without_their_sum() -> dict[str, list[float]]:
    task = make_task(Layout(2, 2, 1, True))
    task.model.layers[0].ffn_norm.weight._backward_hooks.clear()
    steps(task, 0, STEPS)
    return {name: p.flatten().tolist() for name, p in task.model.named_parameters() if name.endswith("norm.weight")}


def test_norms_that_drift_apart_under_sequence_parallelism_are_noticed():
    first, second = run_ranks(replicas_without_their_sum, 2)
    assert first != second


# --- refusals and guards ---


def train_into_infinity(layout: Layout, what: str) -> tuple[str, bool]:
    task = make_task(layout)
    steps(task, 0, 2)
    if what == "loss" and task.topology.rank == task.topology.world - 1:
        with torch.no_grad():
            task.model.norm.weight[0] = float("nan")
    if what == "gradient" and task.topology.rank == 0:
        task.model.norm.weight.register_hook(lambda g: g * float("inf"))
    before = masters(task)
    try:
        steps(task, 2, 3)
    except NonFiniteError as error:
        return str(error), all(torch.equal(before[n].nan_to_num(), t.nan_to_num()) for n, t in masters(task).items())
    return "no error", False


def masters(task: GPTTask) -> dict[str, torch.Tensor]:
    """The full fp32 weights and moments, where this rank gets them."""
    found = {f"{e.group}:{e.key}": e.read(0) for e in task.entries()}
    return {key: tensor.clone() for key, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("layout", [Layout(2, 1, 0), Layout(2, 1, 1), Layout(2, 2, 2), Layout(2, 1, 3)], ids=str)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_stops_all_ranks_before_the_update(layout, what):
    for message, unchanged in run_ranks(train_into_infinity, 2, layout, what):
        assert "not finite" in message
        assert unchanged


def test_splitting_and_merging_is_the_identity():
    names = dict(tiny().named_parameters())
    assert {pattern for pattern, split in TABLE if any(split_of(n) == split for n in names)} == {p for p, _ in TABLE}
    for name, p in names.items():
        for tensor in (1, 2, 4):
            assert torch.equal(merge(name, [cut(name, p, tensor, r) for r in range(tensor)]), p), name
    fused = torch.arange(12.0).view(12, 1)
    assert cut("layers.0.attention.wqkv.weight", fused, 2, 0).flatten().tolist() == [0, 1, 4, 5, 8, 9]


def refused(layout: Layout) -> str:
    try:
        make_task(layout)
    except UserError as error:
        return str(error)
    return "accepted"


def test_impossible_layouts_are_refused_in_a_sentence():
    assert "does not divide this model's heads 4" in run_ranks(refused, 3, Layout(3, 3, 1))[0]
    assert "2 data-parallel ranks" not in run_ranks(refused, 2, Layout(2, 1, 1))[0]
    message = run_ranks(refused, 5, Layout(5, 1, 1))[0]
    assert "12 images cannot be shared equally by 5" in message
    assert "use 4" in message
