"""Ctrl-C while the command line is still importing torch, which takes seconds: a sentence, no traceback.

From the package's first line to the command's: `python -m sib_fast` imports the package before anything of ours could catch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from itertools import pairwise
from types import FrameType


def _is_command_line() -> bool:
    """Whether this process is ours from the start: `sib-fast` or `python -m sib_fast`, not a program that imports the package."""
    # "-m" as long as Python looks for the module, which imports its package.
    if sys.argv[:1] == ["-m"]:
        return ("-m", "sib_fast") in pairwise(sys.orig_argv)
    return sys.argv[:1] != [] and os.path.basename(sys.argv[0]) == "sib-fast"


def _end(signal_number: int, frame: FrameType | None) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes that train one network, one speaks
        os.write(2, b"sib-fast: interrupted. Nothing has been written; the same command starts again.\n")
    os._exit(130)


def raise_from_now_on() -> None:
    """What the command starts with: KeyboardInterrupt again, which it turns into its own sentence."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Not where Ctrl-C is not Python's to handle: ignored, as in the background, or somebody's own handler.
if (
    _is_command_line()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _end)
