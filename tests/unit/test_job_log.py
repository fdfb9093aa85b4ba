"""Time and rank before every line of a job's log; plain lines for a person with a single process."""

import os
import re
import threading

import pytest

from llamagen_dist import program
from llamagen_dist.console import LOG, Progress, set_up_logging
from llamagen_dist.errors import UserError

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", program.ERROR_FILE):
        monkeypatch.delenv(name, raising=False)
    yield
    monkeypatch.undo()
    set_up_logging(launched=False)


def main(argv: list[str]) -> None:
    with Progress("packing", 2) as progress:
        progress.advance(2, "at 100 %s")
    LOG.warning("checkpoint skipped: damaged")
    raise UserError("a.yaml: two mistakes\n  one\n  two")


OUT = ["packing: 0/2 (0 %)", "packing: 2/2 (100 %) at 100 %s", "checkpoint skipped: damaged"]
ERR = ["llamagen: error: a.yaml: two mistakes", "  one", "  two"]


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "four", "RANK": "x"}, None),
        ({"WORLD_SIZE": "4", "RANK": "3"}, "3"),
        ({"WORLD_SIZE": "4"}, "0"),
        ({program.ERROR_FILE: "error.txt", "WORLD_SIZE": "1", "RANK": "0"}, "0"),
    ],
)
def test_plain_for_one_process_and_time_and_rank_in_a_job(tmp_path, monkeypatch, capsys, variables, rank):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        program.run(main)
    assert end.value.code == 2
    said = capsys.readouterr()
    prefix = "" if rank is None else f"{TIME} rank {rank} \\| "
    for text, expected in ((said.out, OUT), (said.err, ERR)):
        lines = text.splitlines()
        assert len(lines) == len(expected)
        for line, words in zip(lines, expected, strict=True):
            assert re.fullmatch(prefix + re.escape(words), line)


@pytest.mark.parametrize("shared", [False, True])
def test_the_last_sentence_does_not_wait_for_a_stuck_stdout(monkeypatch, capsys, shared):
    """A pipe that nobody reads. Sabotage twin: with one lock for both streams it would wait."""
    stdout, stderr = LOG.handlers[:2]  # pytest adds its own
    if shared:
        monkeypatch.setattr(stderr, "lock", stdout.lock)
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        stuck = threading.Thread(target=LOG.info, args=("x" * 1_000_000,))
        stuck.start()
        assert reader.read(1) == b"x", "it is writing"
        last = threading.Thread(target=LOG.error, args=("llamagen: no step for 60 s",))
        last.start()
        last.join(1 if shared else 30)
        assert last.is_alive() is shared
        left = 1_000_000  # the rest of the text and its line's end
        while left > 0:
            left -= len(reader.read1(left))
        stuck.join()
        last.join()
    assert capsys.readouterr().err == "llamagen: no step for 60 s\n"
