"""What sweeps and pipelines hand to a cluster, as far as it can be known without one."""

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamagen_dist import cli
from llamagen_dist.config import ClusterConfig, load
from llamagen_dist.console import Screen
from llamagen_dist.errors import UserError
from llamagen_dist.launch import here, points, stages
from llamagen_dist.launch.folder import JobFolder, JobSpec, finish_whole, read_spec, write_specs
from llamagen_dist.launch.slurm import listing, lock, queue, watch
from llamagen_dist.launch.slurm.launch import Launcher, Target, sweep_node
from llamagen_dist.launch.slurm.listing import script_of
from llamagen_dist.launch.slurm.submit import Size
from llamagen_dist.launch.slurm.task import owner
from llamagen_dist.launch.state import JobState, nothing_runs, state_of

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "slurm/local.yaml"
QUICKSTART = ROOT / "configs/pipeline/quickstart.yaml"


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


def profile(**keys: Any) -> ClusterConfig:
    found: ClusterConfig = load(PROFILE, keys, kind="cluster")
    return found


def sweep_file(folder: Path, **keys: Any) -> Path:
    content: dict[str, Any] = {"kind": "sweep", "title": "t", "module": "llamagen_dist.train_gpt", "at_once": 2, **keys}
    content["config"] = str(ROOT / "configs/gpt/GPT-B.yaml")
    content.setdefault("grid", {"optim.lr": [1e-4, 2e-4, 4e-4]})
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    return folder / "sweep.yaml"


def fake_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """A squeue that knows these jobs; the fields of a line are parted by |."""
    fake(folder, monkeypatch, "squeue", *(line.replace("|", queue.FIELD_END) + queue.JOB_END for line in lines))


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *lines: str) -> None:
    program = folder / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")


def test_a_sweep_is_one_array_of_what_is_open(tmp_path: Path) -> None:
    made = points.sweep(sweep_file(tmp_path), tmp_path / "out")
    size = Target(profile()).size(sweep_node(made))
    assert size == Size(2, 2, 0)
    launcher, node = Launcher(made, Target(profile()), Screen()), sweep_node(made)
    names, ended = [point.name for point in made.nodes], JobState("finished")
    states = dict(zip(names, [JobState("open"), ended, JobState("open")], strict=True))
    text = script_of(launcher, node, states)
    assert "#SBATCH --array=0-1%2" in text
    assert f"--output={tmp_path}/out/log/" in text
    assert script_of(launcher, node, dict.fromkeys(names, ended)) == ""
    (work,) = launcher.submission(node, [made.nodes[1]], tmp_path / "code").specs
    assert work.folder == str(tmp_path / "out/lr-2e-4")
    assert work.arguments == (f"{work.folder}/launch/config.yaml",)
    assert str(work.job.done) == f"{work.folder}/launch/DONE.json"


def test_points_that_cannot_run_on_so_many_ranks_are_refused_before_anything(tmp_path: Path) -> None:
    batches = {"set": {"train.images": 64000}, "grid": {"train.global_batch": [256, 250]}, "nodes": 2}
    made = points.sweep(sweep_file(tmp_path, **batches), tmp_path / "out")
    with pytest.raises(UserError, match=r"point global_batch-250: train\.global_batch: 250 images cannot be shared"):
        Target(profile()).size(sweep_node(made))
    with pytest.raises(UserError, match="there is no sbatch on PATH"):
        cli.main(["sweep", str(sweep_file(tmp_path)), "--out", str(tmp_path / "out"), "--cluster", str(PROFILE)])
    assert not (tmp_path / "out").exists()


def test_more_points_than_an_array_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = points.sweep(sweep_file(tmp_path, grid={"train.seed": list(range(1002))}), tmp_path / "out")
    assert Target(profile()).size(sweep_node(many)).ranks == 4, "nobody to ask"
    fake(tmp_path, monkeypatch, "scontrol", "MaxArraySize            = 1001")
    with pytest.raises(UserError, match="1,002 points: SLURM takes arrays of up to 1,001 here"):
        Target(profile()).size(sweep_node(many))
    fake(tmp_path, monkeypatch, "scontrol", "MaxArraySize            = 1002")
    assert Target(profile()).size(sweep_node(many)).ranks == 4


def test_the_size_of_a_stage(tmp_path: Path) -> None:
    made = stages.plan(QUICKSTART, tmp_path / "out")
    sizes = {stage.name: Target(profile(nodes=2)).stage_size(stage) for stage in made.nodes}
    assert sizes["pack"] == sizes["report"] == Size(1, 1, 0), "a program of one process needs no GPU"
    assert sizes["ladder"] == Size(2, 2, 0)
    gpus = profile(nodes=2, gpus_per_node=8, ranks_per_node=None)
    by_name = {stage.name: stage for stage in made.nodes}
    assert Target(gpus).stage_size(by_name["tokenizer"]) == Size(2, 8, 8)
    with pytest.raises(UserError, match=r"stage tokenizer: train.global_batch: \d+ images cannot be shared"):
        Target(profile(nodes=7, gpus_per_node=8, ranks_per_node=None)).stage_size(by_name["tokenizer"])


def test_a_stage_says_how_many_nodes_it_gets(tmp_path: Path) -> None:
    data = yaml.safe_load(QUICKSTART.read_text())
    wanted = next(stage for stage in data["stages"] if stage["name"] == "sample")
    wanted |= {"nodes": 1, "gpus_per_node": 4, "config": str(ROOT / "configs/eval/quickstart-sample.yaml")}
    data["stages"] = [wanted]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    (stage,) = stages.plan(tmp_path / "p.yaml", tmp_path / "out").nodes
    assert Target(profile(nodes=2)).stage_size(stage) == Size(1, 4, 4)


def test_a_stages_progress_is_that_of_the_run_it_trains(tmp_path: Path) -> None:
    made = stages.plan(QUICKSTART, tmp_path / "out")
    launcher = Launcher(made, Target(profile(nodes=2)), Screen())
    works = [launcher.submission(node, [node]).specs[0] for node in made.nodes]
    ladder = next(work for work in works if work.name == "out-ladder")
    assert ladder.folder == str(tmp_path / "out/stages/ladder")
    assert ladder.produces == (str(tmp_path / "out/ladder/g390k/summary.json"),)
    for rung, step in (("g30k", 8), ("g45k", 4)):
        (tmp_path / f"out/ladder/{rung}/checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"out/ladder/{rung}/checkpoints/step_{step:08d}/COMPLETE").touch()
    assert ladder.steps_done() == 12
    assert JobSpec("x", "m", (), ladder.folder, "").steps_done() == 0, "the stage's own folder has none"
    write_specs(tmp_path / "w.json", [ladder])
    assert read_spec(tmp_path / "w.json") == ladder


def test_the_imagenet_pipeline_hangs_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = stages.plan(ROOT / "configs/pipeline/imagenet.yaml", out, {"images": "/data/i"})
    by_name: dict[str, Any] = {stage.name: stage for stage in made.nodes}
    tokenizer, ladder, sample = (by_name[name] for name in ("tokenizer", "ladder", "sample"))
    assert by_name["tokens"].config.tokenizer == tokenizer.config.run_dir == sample.config.tokenizer
    rungs = {point.name: point.config for point in ladder.sweep.nodes}
    assert {rung.data.train for rung in rungs.values()} == {by_name["tokens"].config.out}
    assert {rung.data.validation for rung in rungs.values()} == {by_name["tokens-held-out"].config.out}
    assert sample.config.checkpoint == rungs["d1024"].run_dir == out / "ladder/d1024"
    assert by_name["evaluate"].config.generated == sample.config.out / "model.npz"
    assert by_name["scaling"].arguments[2] == str(out / "ladder")
    gpus = profile(nodes=1, gpus_per_node=8, ranks_per_node=None)
    sizes = {name: Target(gpus).stage_size(stage).ranks for name, stage in by_name.items()}
    assert sizes == {
        "tokenizer": 8,
        "tokens": 32,
        "tokens-held-out": 8,
        "ladder": 8,
        "sample": 16,
        "evaluate": 8,
        "scaling": 1,
        "report": 1,
    }
    short = stages.plan(ROOT / "configs/pipeline/imagenet.yaml", out, small=0.01)
    assert next(stage for stage in short.nodes if stage.sweep).sweep.nodes[0].config.train.images < 260_000  # type: ignore[union-attr]


def test_a_stage_is_done_when_its_last_point_is(tmp_path: Path) -> None:
    out, done = tmp_path / "ladder", tmp_path / "DONE.json"
    for name in ("a", "b"):
        (out / name / "launch").mkdir(parents=True)
        (out / name / "launch/job.json").touch()
    write = {"seconds": 2.0, "peak_rss_gb": 1.0}
    (out / "a/launch/DONE.json").write_text(json.dumps(write))
    assert not finish_whole(out, done, {"name": "ladder"})
    assert not done.exists()
    (out / "b/launch/DONE.json").write_text(json.dumps(write | {"peak_rss_gb": 3.0}))
    assert finish_whole(out, done, {"name": "ladder"})
    assert json.loads(done.read_text()) == {"name": "ladder", "seconds": 4.0, "peak_rss_gb": 3.0}


def test_a_stage_with_a_sweep_says_where_and_what(tmp_path: Path) -> None:
    stage = {"name": "l", "why": "w", "module": "llamagen_dist.train_gpt", "config": str(sweep_file(tmp_path))}
    for change, said in (
        ({}, "is a sweep: give out"),
        ({"out": "{out}/l", "module": "eval.sample"}, "is a sweep of llamagen_dist.train_gpt"),
        ({"out": "{out}/l", "set": {"optim.lr": 1}}, "optim.lr is swept by"),
        ({"out": "{out}/l", "config": str(ROOT / "configs/gpt/GPT-B.yaml")}, "reads kind: sweep"),
    ):
        content = {"kind": "pipeline", "title": "t", "stages": [stage | change]}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(UserError) as caught:
            stages.plan(tmp_path / "p.yaml", tmp_path / "out")
        assert said in str(caught.value)


def test_a_dry_run_of_a_pipeline_shows_sizes_and_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cli.main(["pipeline", str(QUICKSTART), "--out", str(out), "--cluster", str(PROFILE), "--dry-run"])
    shown = capsys.readouterr().out
    assert "4 ranks on 2 nodes" in shown
    assert "#SBATCH --job-name=out-pack" in shown
    assert "Nothing was started" in shown
    assert not out.exists()


def test_an_items_incarnation_is_named_as_its_lock_and_log() -> None:
    assert owner({"SLURM_JOB_ID": "12"}) == "12.0"
    array = {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "2"}
    assert owner(array) == "11_4.2"


def held(folder: Path, job: str) -> None:
    place = JobFolder.of(folder)
    place.path.mkdir(parents=True)
    lock.take(place, "abc")
    lock.name_jobs(place, "abc", (job,))


def test_this_machine_leaves_folders_alone_in_which_a_clusters_job_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = points.sweep(sweep_file(tmp_path), tmp_path / "out")
    folder = made.nodes[1].folder
    nothing_runs([folder])  # never launched on a cluster: nobody is asked
    held(folder, "7_1")
    with pytest.raises(UserError, match=r"whether its job still runs cannot be asked .* delete .*lock\.json"):
        nothing_runs([folder])
    fake_squeue(tmp_path, monkeypatch, "7_1|RUNNING|None|1|n1|10:00|abc|x")
    with pytest.raises(UserError, match="job 7_1 runs there"):
        nothing_runs([folder])
    made.keep()
    with pytest.raises(UserError, match="job 7_1 runs there"):
        here.run(made)
    state = listing.states(made)[made.nodes[1].name]
    assert (state.kind, state.reason) == ("running", "job 7_1")
    fake_squeue(tmp_path, monkeypatch, "7_1|CANCELLED|None|1||10:00|abc|x")
    nothing_runs([folder])
    assert [state.kind for state in listing.states(made).values()] == ["open"] * 3


@pytest.mark.parametrize("items", [True, False], ids=["own item", "sabotage twin: any item"])
def test_of_an_array_whose_launch_was_killed_a_point_finds_its_own_item(
    items: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after sbatch: no folder names a job, all items carry its token."""
    folders = [JobFolder.of(tmp_path / str(number)) for number in range(3)]
    for number, folder in enumerate(folders):
        folder.path.mkdir(parents=True)
        lock.take(folder, "abc", None, number if items else None)
        os.utime(folder.lock, (0, 0))
    lines = ["9_0|FAILED|None|1||1:00|abc|x", "9_1|RUNNING|None|1|n1|1:00|abc|x", "9_2|PENDING|None|1||1:00|abc|x"]
    fake_squeue(tmp_path, monkeypatch, *lines)
    states = [state_of(folder, queue.my_jobs()) for folder in folders]
    found = [(state.kind, state.queued and state.queued.job) for state in states]
    right = [("open", "9_0"), ("running", "9_1"), ("waiting", "9_2")]
    assert (found == right) == items


def test_a_job_that_will_never_begin_is_as_good_as_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(tmp_path / "stage", "8")
    job = JobFolder.of(tmp_path / "stage")
    fake_squeue(tmp_path, monkeypatch, "8|PENDING|DependencyNeverSatisfied|1||1:00|abc|x")
    assert state_of(job, queue.my_jobs()).leaving
    fake_squeue(tmp_path, monkeypatch, "8|PENDING|Dependency|1||1:00|abc|x")
    assert not state_of(job, queue.my_jobs()).leaving
    fake_squeue(tmp_path, monkeypatch, "8|CANCELLED|DependencyNeverSatisfied|1||1:00|abc|x")
    assert not state_of(job, queue.my_jobs()).leaving, "it has gone: nothing to wait for"
    done = JobFolder.of(tmp_path / "other")
    done.path.mkdir(parents=True)
    done.done.touch()
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    monkeypatch.setattr(watch, "ASK_EVERY_S", 0.02)

    class Quiet:
        said: list[str] = []  # noqa: RUF012 - one test's

        def say(self, text: str) -> None:
            self.said.append(text)

    began = time.monotonic()
    assert watch.watch({"last": job, "other": done}, Quiet()) == {"last": "no job runs or waits for it any more"}  # type: ignore[arg-type]
    assert time.monotonic() - began < 5
    assert any("last: no job runs" in line for line in Quiet.said)


def test_a_comment_of_several_lines_hides_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(tmp_path, monkeypatch, "7|RUNNING|None|1|n1|1:00|todo:\n8 PENDING|x", "9|PENDING|Priority|1||1:00|t|y")
    found = queue.my_jobs()
    assert list(found) == ["7", "9"]
    assert found["9"].comment == "t"


def test_a_disk_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    from llamagen_dist.files import only_launcher

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_launcher(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
