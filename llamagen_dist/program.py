"""How every program starts and ends: arguments in, exit code out. Imports nothing heavy."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llamagen_dist.console import LOG, set_up_logging
from llamagen_dist.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR, Stopped, Superseded, UserError

ERROR_FILE = "LLAMAGEN_ERROR_FILE"  # environment variable: where a launched rank leaves its sentence

# Environment variables by which a cluster's job tells a rank which incarnation of the job it belongs to.
OWNER = "LLAMAGEN_OWNER"  # JOB.RESTART, the rank's incarnation
LOCK = "LLAMAGEN_LOCK"  # the file (owner.json) that names the incarnation which may write
SIGNAL_DELAY = "LLAMAGEN_SIGNAL_DELAY_S"  # how long before the time limit the job is signalled


def run(main: Callable[[list[str]], None]) -> None:
    """Run ``main(sys.argv[1:])`` and end the process with the exit code of how it ended.

    UserError: its sentence on stderr, exit 2.
    Stopped, Superseded: the message on stderr, exit 75.
    Ctrl-C: one line, exit 130.
    Any other exception is a bug: it keeps its traceback, exit 1.

    After a bug and after Superseded the process group is not taken down, which could wait for ranks that never answer:
    the closing sockets end their collectives. Lines of one rank of a job carry time and rank (``set_up_logging``).
    """
    code = 0
    set_up_logging(launched=ERROR_FILE in os.environ)
    try:
        main(sys.argv[1:])
    except UserError as error:
        LOG.error(f"llamagen: error: {error}")
        leave_sentence(str(error))
        code = EXIT_USER_ERROR
    except Stopped as stopped:
        LOG.error(f"llamagen: {stopped}")
        leave_sentence(str(stopped))
        code = EXIT_STOPPED
    except Superseded as lost:
        LOG.error(f"llamagen: {lost}")
        leave_sentence(str(lost))
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        LOG.error("llamagen: interrupted")
        code = EXIT_INTERRUPTED
    leave_group()
    if code:
        sys.exit(code)


def leave_sentence(sentence: str) -> None:
    """Write the sentence where the launcher looks for it (nothing to do outside a launched job)."""
    target = os.environ.get(ERROR_FILE)
    if target:
        scratch = Path(f"{target}.tmp")
        with suppress(OSError):  # a full disk must not change how the process ends
            scratch.write_text(sentence, encoding="utf-8")
            scratch.replace(target)


def leave_group() -> None:
    """Destroy the process group if this process ever joined one; never imports torch for it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
