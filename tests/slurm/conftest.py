"""One real cluster for the session. Where it cannot be started the tests fail: a skip would look like success."""

from collections.abc import Iterator

import pytest

from tests.slurm.local_cluster import cluster


@pytest.fixture(scope="session", autouse=True)
def slurm() -> Iterator[None]:
    with cluster():
        yield
