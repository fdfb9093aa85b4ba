"""The sbatch script, profiles, and the few facts that ranks derive from SLURM's variables."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamagen_dist.config import ClusterConfig, load
from llamagen_dist.config.launch import minutes
from llamagen_dist.errors import UserError
from llamagen_dist.launch.folder import JobFolder, JobSpec, Limits, read_spec, steps_done, write_specs
from llamagen_dist.launch.slurm.submit import Size, Submission, job_name
from llamagen_dist.launch.slurm.task import first_host, port
from llamagen_dist.tracking.provenance import masked_script

ROOT = Path(__file__).parent.parent.parent
SIZE = Size(2, 8, 8)


def work(folder: str = "/shared/runs/GPT 3B", **more) -> JobSpec:
    return JobSpec("GPT-3B", "llamagen_dist.train_gpt", ("/x.yaml",), folder, "/shared/code", **more)


def profile(**keys) -> ClusterConfig:
    return ClusterConfig(kind="cluster", **keys)


def test_the_script_says_what_the_profile_says():
    text = Submission(
        (work(),),
        profile(
            partition="gpu",
            account="lab",
            qos="long",
            constraint="a100",
            time="2-00:00:00",
            signal_delay_s=600,
            memory_gb=500,
            cpus_per_rank=12,
            exclusive=True,
            modules=("cuda/12.4",),
            exports={"HF_HOME": "/scratch/my files"},
            nccl={"SOCKET_IFNAME": "ib0"},
            setup=("ulimit -n 65536",),
            python="apptainer exec --nv /shared/image.sif python",
            sbatch={"reservation": "mine", "nice": True},
            srun=("--cpu-bind=none",),
        ),
        SIZE,
        after=("12", "13"),
    ).script()
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --qos=long",
        "#SBATCH --constraint=a100",
        "#SBATCH --time=2880",
        "#SBATCH --signal=USR2@600",
        "#SBATCH --mem=500000M",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --exclusive",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --requeue",
        "#SBATCH --reservation=mine",
        "#SBATCH --nice",
        "#SBATCH --dependency=afterok:12:13",
        "#SBATCH --kill-on-invalid-dep=yes",
        "module load cuda/12.4",
        "unset OMP_NUM_THREADS MKL_NUM_THREADS",
        "export HF_HOME='/scratch/my files'",
        "export NCCL_SOCKET_IFNAME=ib0",
        "ulimit -n 65536",
    ):
        assert line in text.splitlines(), line
    (srun,) = (line for line in text.splitlines() if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --cpu-bind=none apptainer exec --nv /shared/image.sif python -u -m" in srun
    assert "wckey" not in text
    # nothing may stand between srun and the line that keeps its status
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert lines[lines.index(srun) + 1] == "status=$?"
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_an_array_runs_so_many_at_a_time_and_keeps_its_logs_apart():
    works = tuple(work(f"/runs/{n}") for n in range(6))
    text = Submission(works, profile(gpus_per_node=0), Size(1, 1, 0), at_once=3, logs=Path("/sweep/log")).script()
    assert "#SBATCH --array=0-5%3" in text
    assert "%A_%a" in text
    assert "gpus-per-node" not in text


def test_secrets_are_hidden_from_people_but_not_from_the_job():
    text = Submission((work(),), profile(exports={"WANDB_API_KEY": "abc123", "HOME_DIR": "/h"}), SIZE).script()
    assert "export WANDB_API_KEY=abc123" in text
    assert "abc123" not in masked_script(text)
    assert "export HOME_DIR=/h" in masked_script(text)


SECRETS = {
    "export": {"exports": {"WANDB_API_KEY": "def123"}},
    "line break": {"exports": {"WANDB_API_KEY": "abc\ndef123\n"}},
    "line break and quotes": {"exports": {"MY_CREDENTIALS": 'it\'s\n"def123"'}},
    "several": {"exports": {"HF_TOKENS": "abc:def123"}},
    "setup": {"setup": ["export HF_TOKEN=def123"]},
    "setup, quoted": {"setup": ["export 'HF_TOKEN=abc def123'", 'export "X_SECRET=abc\ndef123"']},
    "setup, two on a line": {"setup": ["module load cuda; DB_PASSWORD='abc\ndef123' ./login"]},
    "setup, option": {"setup": ["hf auth login --token def123", "curl --api-key=def123 x"]},
    "setup, wandb": {"setup": ["wandb login def123"]},
}


@pytest.mark.parametrize("keys", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_hidden_whole_wherever_the_profile_sets_it(keys):
    text = Submission((work(),), profile(**keys), SIZE).script()
    assert "def123" in text
    assert "def123" not in masked_script(text)
    assert "***" in masked_script(text)


def test_what_is_no_secret_is_shown():
    exports = {"TOKENIZER": "/data/vq16", "TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO"}
    lines = ["module load cuda", "export TOKENIZER_PATH='/data/a b'", "llamagen pack x --caption-key text --tokens 256"]
    text = Submission((work(),), profile(exports=exports, setup=lines, sbatch={"wckey": "vision"}), SIZE).script()
    assert masked_script(text) == text


@pytest.mark.parametrize(
    ("written", "expected"),
    [("90", 90), ("90:30", 90.5), ("12:00:00", 720), ("2-00:00:00", 2880), ("2-12", 3600), ("1-00:30", 1470)],
)
def test_times_are_read_as_slurm_reads_them(written, expected):
    assert minutes(written) == expected


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"partion": "x"}, "partion: unknown key; did you mean partition?"),
        ({"time": "2 days"}, "write a time as SLURM does"),
        ({"time": "00:00:30"}, "at least one"),
        ({"time": "10", "signal_delay_s": 600}, "is before its start; lower it or ask for more time"),
        ({"sbatch": {"time": "5"}}, "time is set by time, not here"),
        ({"sbatch": {"job_name": "x"}}, "job_name is set by the launcher"),
        ({"exports": {"MY VAR": "1"}}, "'MY VAR' is not a valid name of an environment variable"),
        ({"nodes": 2, "elastic": {"nodes": [2]}}, "node counts below nodes (2)"),
        ({"ranks_per_node": 4}, "with GPUs it is one rank per GPU"),
    ],
)
def test_a_wrong_profile_is_refused_in_words(tmp_path, keys, sentence):
    with pytest.raises(UserError) as refused:
        load(ROOT / "slurm/local.yaml" if "gpus_per_node" in keys else _file(tmp_path), keys, kind="cluster")
    assert sentence in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def _file(folder: Path) -> Path:
    (folder / "site.yaml").write_text("kind: cluster\n")
    return folder / "site.yaml"


@pytest.mark.parametrize("file", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_profile_makes_a_script(file):
    shipped = load(file, kind="cluster")
    text = Submission((work(),), shipped, Size(shipped.nodes, shipped.ranks, shipped.gpus_per_node)).script()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@given(st.text(max_size=40))
def test_any_name_becomes_one_that_slurm_takes(name):
    assert job_name(name)
    assert all(letter.isascii() and (letter.isalnum() or letter in "._+-") for letter in job_name(name))


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("n[03-5,9],m1", "n03"),
        ("gpu-a[001,004-006]", "gpu-a001"),
        ("rack[2-3]n[1-4]", "rack2n1"),
        ("login.example,n1", "login.example"),
        ("n[5-9]-ib", "n5-ib"),
    ],
)
def test_the_first_host_of_a_list(nodelist, first):
    assert first_host(nodelist) == first


def test_every_restart_has_a_port_of_its_own_below_those_given_to_anybody():
    ports = [port(f"{job}.{restart}") for job in range(300, 340) for restart in range(5)]
    assert all(15000 <= p < 32000 for p in ports)
    assert len({port(f"4711.{restart}") for restart in range(20)}) == 20
    assert len(set(ports)) > 190


def test_a_work_file_gives_back_what_was_written(tmp_path):
    works = [work(limits=Limits(False, 3, 1, 60), produces=("/a", "/b"), record={"name": "x"}), work("/y")]
    write_specs(tmp_path / "work.json", works)
    assert [read_spec(tmp_path / "work.json", n) for n in (0, 1)] == works


def test_progress_is_that_of_checkpoints_that_count(tmp_path):
    assert steps_done(tmp_path) == 0
    for run, step, whole in (("", 5, True), ("", 8, True), ("", 9, False), ("rung", 4, True)):
        folder = tmp_path / run / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "COMPLETE").touch()
    assert steps_done(tmp_path) == 12  # 8 and the rung's 4; 9 was never finished
    other = tmp_path / "extract.launch"
    JobFolder.of(other).path.mkdir(parents=True)
    JobFolder.of(other).progress.write_text('{"done": 7}')
    assert steps_done(other) == 7
    (other / "record.json").touch()  # a training run that has shown 7 images and saved none of it
    assert steps_done(other) == 0


def test_a_torn_history_is_read_up_to_the_tear(tmp_path):
    place = JobFolder.of(tmp_path)
    place.path.mkdir()
    place.tell("submitted", job="1")
    place.tell("started", job="1")
    with open(place.history, "a") as file:
        file.write('{"event": "en')
    assert [event["event"] for event in place.events()] == ["submitted", "started"]
    place.tell("done", job="1")
    assert [event["event"] for event in place.events()] == ["submitted", "started", "done"]
