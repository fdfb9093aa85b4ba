"""Whose turn it is among the jobs of one launch, and when a stand-by is held back: every state of SLURM's queue."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamagen_dist.config import ClusterConfig, load
from llamagen_dist.errors import UserError
from llamagen_dist.launch.folder import JobFolder, JobSpec, Limits, outcome_of
from llamagen_dist.launch.graph import single
from llamagen_dist.launch.slurm import lock
from llamagen_dist.launch.slurm.elastic import (
    Decision,
    begins,
    claim,
    decide_turn,
    left_over,
    makes_room,
    period_s,
    room_for,
)
from llamagen_dist.launch.slurm.launch import Target, fits, fixed_micro_batch, launch
from llamagen_dist.launch.slurm.lock import Lock, own
from llamagen_dist.launch.slurm.queue import NodeKind, QueuedJob
from llamagen_dist.launch.slurm.submit import Size, Submission

JOBS = ("40", "20", "10")  # named after their nodes
AFTER_S = 100.0


def queue(reason: str = "Resources", **states: str) -> dict[str, QueuedJob]:
    """big=…, middle=…, small=…"""
    names = dict(zip(("big", "middle", "small"), JOBS, strict=True))
    return {
        names[key]: QueuedJob(names[key], state, reason, int(names[key]), "", "", "", "")
        for key, state in states.items()
    }


def ask(me: str, owner: str | None, quiet_s: float = 0.0, **states: str) -> Decision:
    return decide_turn(me, JOBS, queue(**states), owner, quiet_s, AFTER_S)


def test_the_wanted_job_begins_alone():
    assert ask("40", None, big="RUNNING", middle="PENDING", small="PENDING") == Decision("go")


def test_a_stand_by_goes_on_for_a_job_that_waits_for_its_nodes():
    assert ask("20", "40", 200, big="PENDING", middle="RUNNING", small="PENDING").action == "go"
    assert ask("10", None, 200, big="PENDING", middle="PENDING", small="RUNNING").action == "go"


def test_a_stand_by_waits_while_a_larger_one_runs_and_shows_it():
    found = ask("20", "40", 5, big="RUNNING", middle="RUNNING", small="PENDING")
    assert (found.action, found.others) == ("stand by", ("40",))
    # and takes over from one that has been silent for as long as it stands by for
    found = ask("20", "40", 101, big="RUNNING", middle="RUNNING", small="PENDING")
    assert (found.action, found.others, found.lost) == ("take over", ("40",), True)


def test_a_larger_one_takes_over_from_all_smaller_ones():
    found = ask("40", "20", 5, big="RUNNING", middle="RUNNING", small="COMPLETING")
    assert (found.action, found.others, found.lost) == ("take over", ("20", "10"), False)


def test_a_cancelled_run_does_not_rise_again():
    for state in ("CANCELLED", "FAILED", "NODE_FAIL", "COMPLETED"):
        assert ask("20", "40", 200, big=state, middle="RUNNING", small="PENDING").action == "give up"
        assert ask("20", None, 200, big=state, middle="RUNNING", small="PENDING").action == "give up"
    assert ask("20", "40", 200, middle="RUNNING").action == "give up"  # SLURM has forgotten it, so it has ended
    # but the one that ran last goes on, whoever was cancelled beside it
    assert ask("20", "20", 200, big="CANCELLED", middle="RUNNING").action == "go"
    # an owner of an earlier launch says nothing
    assert ask("20", "7", 200, big="PENDING", middle="RUNNING").action == "go"


STATES = st.sampled_from(["PENDING", "RUNNING", "COMPLETING", "CANCELLED"])


@given(st.tuples(STATES, STATES, STATES), st.sampled_from([None, *JOBS]), st.sampled_from([0.0, 200.0]))
def test_of_two_running_jobs_never_both_go_on(states, owner, quiet_s):
    """In whatever order they ask, at most one of two that run goes without waiting for the other's end."""
    assert both_go_on(decide_turn, states, owner, quiet_s) == []


def test_a_rule_that_looks_at_nobody_is_caught():
    assert both_go_on(lambda *_: Decision("go"), ("RUNNING", "RUNNING", "PENDING"), None, 0.0) == [
        ("40", "20"),
        ("20", "40"),
    ]


def both_go_on(
    rule: Callable[..., Decision], states: tuple[str, ...], owner: str | None, quiet_s: float
) -> list[tuple[str, str]]:
    """Pairs of running jobs of which the first would go on without waiting for the second's end."""
    found = {job: QueuedJob(job, state, "", 1, "", "", "", "") for job, state in zip(JOBS, states, strict=True)}
    bad = []
    for one, other in itertools.combinations([job for job in JOBS if found[job].state == "RUNNING"], 2):
        for me, rival in ((one, other), (other, one)):
            answer = rule(me, JOBS, found, owner, quiet_s, AFTER_S)
            if answer.action == "go" or (answer.action == "take over" and rival not in answer.others):
                bad.append((me, rival))
    return bad


def test_the_keeper_holds_back_what_is_smaller_and_waits():
    waits = queue(big="PENDING", middle="RUNNING", small="PENDING")
    assert begins("40", JOBS, queue(big="RUNNING", middle="PENDING", small="PENDING"), 100) == {"20": 125, "10": 225}
    assert begins("20", JOBS, waits, 100) == {"10": 125}  # never a larger one
    assert begins("10", JOBS, waits, 100) == {}
    assert begins("99", JOBS, waits, 100) == {}
    for after_s in (4.0, 60.0, 1800.0, 1e6):  # three pushes may be lost before one begins
        assert 3 * period_s(after_s) <= after_s


def room(idle: int, now: float = 1000.0, *events: dict[str, Any], reason: str = "Resources") -> str | None:
    states = queue(reason, big="PENDING", middle="RUNNING", small="PENDING")
    return room_for("20", JOBS, states, [NodeKind(50, idle, 8, 4, None)], events, 100.0, now)


def test_a_smaller_one_gives_its_nodes_back_where_that_helps():
    assert room(idle=20) == "40"  # with its own 20 there are enough
    assert room(idle=19) is None
    assert room(20, reason="ReqNodeNotAvail, UnavailableNodes:n2") is None
    assert room(20, reason="Priority") is None


def test_a_try_that_did_not_help_is_not_repeated_soon():
    tries = [{"event": "makes_room", "job": "20", "time": 1000.0 + n} for n in range(3)]
    assert room(20, 1150.0, tries[0]) is None
    assert room(20, 1250.0, tries[0]) == "40"
    assert room(20, 1250.0, *tries) is None
    assert room(20, 1850.0, *tries) == "40"
    assert room(20, 1250.0, *tries, {"event": "started", "job": "40", "time": 1100.0}) == "40"  # it had helped


def test_what_history_says_of_hand_overs(tmp_path):
    place = JobFolder.of(tmp_path)
    place.path.mkdir()
    place.tell("started", job="20")
    assert makes_room(place, "20") is None
    place.tell("takes_over", job="40", **{"from": "20"})
    assert makes_room(place, "20") == "40"
    place.tell("started", job="40")
    place.tell("started", job="20")
    assert makes_room(place, "20") is None  # that was an earlier incarnation
    place.tell("makes_room", job="20", **{"for": "40"})
    assert makes_room(place, "20") == "40"
    assert outcome_of(place.events()) == ""
    place.tell("done", job="20")
    assert outcome_of(place.events()) == "done"
    place.tell("submitted", job="50")
    assert outcome_of(place.events()) == ""


def test_stand_bys_of_a_cancelled_run_are_left_over(tmp_path):
    place, held = JobFolder.of(tmp_path), Lock("token", JOBS, "me", "here", 0.0)
    place.path.mkdir()
    own(place, "40.1")
    assert left_over(place, held, queue(big="CANCELLED", middle="PENDING", small="PENDING")) == ["20", "10"]
    assert left_over(place, held, queue(big="PENDING", middle="PENDING", small="PENDING")) == []
    assert left_over(place, held, queue(big="CANCELLED", middle="RUNNING", small="PENDING")) == []  # it knows itself
    place.tell("done", job="40")
    assert left_over(place, held, queue(big="COMPLETED", middle="PENDING")) == ["20"]


def test_a_queue_without_this_very_job_is_no_answer(tmp_path, monkeypatch):
    """As in a container whose user has another name: squeue answers and lists nothing."""
    program = tmp_path / "bin/squeue"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    place = JobFolder.of(tmp_path / "run")
    place.path.mkdir(parents=True)
    lock.take(place, "t")
    lock.name_jobs(place, "t", JOBS)
    work = JobSpec("x", "m", (), str(tmp_path / "run"), "/code", token="t", limits=Limits(after_s=AFTER_S))
    assert claim(work, f"{JOBS[0]}.0"), "the wanted job goes on: the fence keeps all others from writing"
    assert not claim(work, f"{JOBS[1]}.0"), "a stand-by does not"


PROFILE = {"kind": "cluster", "nodes": 4, "gpus_per_node": 2, "elastic": {"nodes": [2, 1], "after_minutes": 30}}


def stand_bys(size: Size) -> list[tuple[int, str | None]]:
    work = JobSpec("x", "m", (), "/run", "/code")
    return [(less.size.nodes, less.begin) for less in Submission((work,), ClusterConfig(**PROFILE), size).stand_bys]


def test_the_stand_bys_of_a_profile():
    assert stand_bys(Size(4, 2, 2)) == [(2, "now+1800"), (1, "now+3600")]
    assert stand_bys(Size(2, 2, 2)) == [(1, "now+1800")]  # --nodes 2
    assert stand_bys(Size(1, 2, 2)) == []


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"requeue": False}, "needs requeue: true"),
        ({"elastic": {"nodes": [4]}}, "node counts below nodes"),
        ({"elastic": {"nodes": [1, 2]}}, "the largest first"),
        ({"elastic": {"nodes": [1], "after_minutes": 0}}, "greater than 0"),
    ],
)
def test_stand_bys_that_cannot_work_are_refused(tmp_path, keys, sentence):
    import yaml

    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**PROFILE, **keys}))
    with pytest.raises(UserError, match=sentence):
        load(file)


def test_fewer_ranks_accumulate_pieces_of_the_same_size():
    config = load("configs/gpt/quickstart.yaml", ["train.global_batch=32", "train.images=3200", "run_dir=x"])
    assert fixed_micro_batch(config, 4).train.micro_batch == 8
    given = load("configs/gpt/quickstart.yaml", ["train.micro_batch=2"])
    assert fixed_micro_batch(given, 4) is given


def test_fewer_ranks_whose_share_the_micro_batch_does_not_divide_are_refused_before_the_queue(tmp_path, monkeypatch):
    """24 images on 8 ranks are pieces of 3; 6 ranks have 4 images each, so that stand-by would fail the run."""
    monkeypatch.setenv("PATH", "/nowhere")
    keys = ["train.global_batch=24", "train.images=2400", f"run_dir={tmp_path / 'run'}"]
    config = load("configs/gpt/quickstart.yaml", keys)
    profile = ClusterConfig(kind="cluster", nodes=4, ranks_per_node=2, gpus_per_node=0, elastic={"nodes": [3]})
    with pytest.raises(UserError, match=r"elastic\.nodes: 3: train\.micro_batch: 3 does not divide"):
        launch(single("llamagen_dist.train_gpt", config), Target(profile), dry_run=True)
    fits(config, 6)  # sabotage twin: the config without the micro-batch that the stand-by gets says nothing
