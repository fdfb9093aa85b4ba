"""One thread per process everywhere: forked ranks may not inherit a running thread pool, and 2 cores are few."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
settings.register_profile("shared machine", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("shared machine")
