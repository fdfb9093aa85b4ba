"""What every test may rely on, wherever the tests are started.

One thread per process: forked ranks may not inherit a running thread pool, and 2 cores are few. Ctrl-C works: a shell
starts what it puts into the background with SIGINT ignored, which the programs under test would inherit.
"""

import os
import signal

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
settings.register_profile("shared machine", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("shared machine")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
