"""Six of the twelve faults on the real cluster, three for a GPT and three for a tokenizer; make faults has all."""

from collections.abc import Iterator

import pytest

from tests.slurm.faults.campaign import Campaign, Result
from tests.slurm.faults.injections import FAULTS, NODES
from tests.slurm.faults.programs import PROGRAMS
from tests.slurm.local_cluster import another_cluster

# the longest first: they run three at a time
CASES = [(1, "gpt"), (6, "tokenizer"), (2, "tokenizer"), (8, "tokenizer"), (5, "gpt"), (12, "gpt")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Result]]:
    by_number = {fault.number: fault for fault in FAULTS}
    with another_cluster(NODES):
        campaign = Campaign(tmp_path_factory.mktemp("faults"), [*PROGRAMS], at_once=3)
        try:
            found = campaign.run([(by_number[number], program) for number, program in CASES])
        finally:
            campaign.close()
        yield {result.fault.number: result for result in found}


@pytest.mark.parametrize(("number", "program"), CASES)
def test_the_run_ends_as_if_nothing_had_happened(results: dict[int, Result], number: int, program: str):
    result = results[number]
    assert result.problems == ()
    assert (result.restarts == 0) == (number == 12), "the fault has hit the run"
