"""What every test may rely on, wherever the tests are started.

One thread per process: forked ranks may not inherit a running thread pool, and 2 cores are few. Ctrl-C works: a shell
starts what it puts into the background with SIGINT ignored, which the programs under test would inherit.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
settings.register_profile("shared machine", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("shared machine")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def inception_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the converted Inception weights: hashed and converted once for all test files and workers."""
    from llamagen_dist.config import InceptionSection
    from llamagen_dist.evaluation import inception_weights

    own = tmp_path_factory.getbasetemp()
    cache = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "inception-cache"
    found = inception_weights.open_extractor(InceptionSection(cache=cache))
    assert not isinstance(found, str), "the inception extra is part of the test environment"
    assert found.record["canonical"] is True
    return cache


@pytest.fixture(scope="session")
def inception_network(inception_cache: Path) -> Any:
    """The network of FID, shared: a test that changes it must put back every bit."""
    from llamagen_dist.config import InceptionSection
    from llamagen_dist.evaluation import inception_weights

    found = inception_weights.open_extractor(InceptionSection(cache=inception_cache))
    assert not isinstance(found, str)
    return found.network
