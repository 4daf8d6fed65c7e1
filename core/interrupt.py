"""Ends a script silently on Ctrl-C while it imports torch, and while it exits. Scripts import this module first.

cli() sets Python's own handler while main() runs. Has no effect if the running script is not part of this project.
"""

import os
import signal
import sys
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def exit_silently(*_: object) -> None:
    os._exit(130)


if (
    os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "/").startswith(ROOT + os.sep)
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, exit_silently)
