"""How a program may end: the exceptions that are not bugs, and the exit codes."""

import re

LOST_PEER = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out (waiting|after)|wait timeout after"
    r"|pair closure"  # gloo's second wait after a time-out; its message names neither gloo nor the time
)
"""What gloo, NCCL and torch's store say when another rank has gone: such an error has its cause elsewhere."""
TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
"""In such a message: it came after a collective's whole time-out, not at once from a broken connection."""
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: run the same command again
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can put right.

    The message is one clear sentence (or a few lines, one per problem) that says what is wrong, where (file,
    key, shard, rank) and what to do. Programs print it without a traceback and exit with code 2. Every other
    exception is a bug: it keeps its traceback and exits with code 1.
    """


class Stopped(Exception):
    """The program was told to stop, has saved, and is not finished; the same command resumes it."""


class Superseded(Exception):
    """The run continues elsewhere, in another incarnation of its job: this process may not write there any more."""
