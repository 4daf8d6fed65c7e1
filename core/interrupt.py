"""Ends a script silently on Ctrl-C while it is still importing torch. Scripts import this module first.

cli() restores Python's own handler. Nothing changes where the script that runs is not one of this project's.
"""

import os
import signal
import sys
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def exit_silently(*_):
    os._exit(130)


if (
    os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "/").startswith(ROOT + os.sep)
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, exit_silently)
