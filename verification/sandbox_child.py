"""The sandbox's own processes. sandbox.py starts this file as a script: python -I sandbox_child.py PID TIMEOUT MEMORY LAYERS

The first process stays a supervisor: it starts one process for the tests and one for the program, watches what the
program takes, and ends as the tests end. All of them die with the caller's process PID.
"""

import contextlib
import json
import os
import select
import signal
import stat
import sys
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from verification.confine import (  # noqa: E402
    BOX_BYTES,
    BOX_FILES,
    FILE_BYTES,
    THREADS,
    confine,
    die_with_parent,
    enter_private_root,
    make_private_root,
)
from verification.program_side import run_program  # noqa: E402
from verification.stand_ins import Uncheckable  # noqa: E402
from verification.tests_side import run_tests  # noqa: E402

del sys.path[0]

UNCHECKABLE = 3  # exit status when the tests need what cannot be checked from outside the program
TOO_MANY_FILES = f"wrote more than {BOX_BYTES >> 20} MiB of files"


# ---------------------------------------------------------------- the two processes


def start(role, alive, settings, private, run):
    """Fork a process that gives up its rights and calls run(); its id.

    alive: a pipe that the supervisor keeps open. private: the box, if it is a private root.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.close(alive[1])
        die_with_parent()
        if select.select([alive[0]], [], [], 0)[0]:  # the supervisor ended before that
            os._exit(1)
        os.close(alive[0])
        if role == "program":  # the tests are in the file that is descriptor 0
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        if private:
            enter_private_root(private)
        os.environ.update(TMPDIR=os.getcwd(), OMP_NUM_THREADS="1")  # numpy would otherwise start a thread per core
        timeout, memory_mb, layers = settings
        confine(timeout + 1, memory_mb, layers, watched=role == "program" and not private)
        run()
        status = 0
    except SystemExit:  # to leave early is to fail
        pass
    except Uncheckable as error:
        print(f"\ncannot be checked: {error}", flush=True)
        status = UNCHECKABLE
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def supervise(tests, program, box, watch_files):
    """Wait for the tests' process and end the program's with it; the exit status of the tests."""
    interval, codes, reason = 0.02 if watch_files else 0.05, {}, None
    while tests not in codes and not reason:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        if program not in codes:
            reason = excess(program, box, watch_files)
        if tests not in codes and not reason:
            wait_for_child(interval)
    for process in {program, tests} - {*codes}:
        os.kill(process, signal.SIGKILL)
    while len(codes) < 2:  # in any order: a process namespace's first process ends last
        ended, status = os.waitpid(-1, 0)
        codes[ended] = os.waitstatus_to_exitcode(status)
    if watch_files and not reason and box_bytes(box) > BOX_BYTES:
        reason = TOO_MANY_FILES
    code = 1 if reason else codes[tests]
    if reason or code < 0:
        print(reason or f"killed by signal {-code}", flush=True)
    return 1 if code < 0 else code


def wait_for_child(seconds):
    """Sleep until a child ends, but not longer than that."""
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait([signal.SIGCHLD], seconds)
    else:
        time.sleep(min(seconds, 0.01))


def excess(pid, box, watch_files):
    """What a program has too much of, in words, or None."""
    with contextlib.suppress(OSError):  # it ended, or there is no /proc
        if os.stat(f"/proc/{pid}/task").st_nlink - 2 > THREADS:
            return f"started more than {THREADS} threads"
    if watch_files and box_bytes(box) + deleted_bytes(pid, box) > BOX_BYTES:
        return TOO_MANY_FILES
    return None


def file_bytes(status):
    """What a file counts: its size or its blocks, the larger, and at least its part of the box."""
    return max(BOX_BYTES // BOX_FILES, status.st_size, 512 * status.st_blocks)


def box_bytes(box):
    """Bytes of the files and folders in a folder. Infinite if some of them cannot be seen, or are too many."""
    size = 0

    def unseen(error):
        nonlocal size
        if not isinstance(error, FileNotFoundError):  # gone meanwhile
            size = float("inf")

    try:
        for folder, folders, names in os.walk(box, onerror=unseen):
            for name in names + folders:
                with contextlib.suppress(FileNotFoundError):
                    size += file_bytes(os.lstat(os.path.join(folder, name)))
            if size > BOX_BYTES:
                break
    except (OSError, RecursionError):  # a name too long, folders too deep
        return float("inf")
    return size


def deleted_bytes(pid, box):
    """Bytes of files that a process has deleted but still holds open or mapped. A mapped one counts as a full file."""
    held = {}
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = os.stat(entry.path)
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    held[status.st_ino] = file_bytes(status)
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(box + "/") and fields[5].endswith(" (deleted)\n"):
                held.setdefault(int(fields[4]), FILE_BYTES)
    return sum(held.values())


def main(caller, timeout, memory_mb, layers):
    """Divide into the supervisor, the tests and the program; the exit status."""
    settings = float(timeout), int(memory_mb), tuple(layers.split(","))
    die_with_parent()
    if os.getppid() != int(caller):  # it ended before that
        return 1
    box = os.path.realpath(os.getcwd())
    private = box if "namespaces" in settings[2] and make_private_root(box) else None
    die_with_parent()  # again: a new user namespace clears it
    if os.getppid() != int(caller):
        return 1
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    alive, questions, answers = os.pipe(), os.pipe(), os.pipe()

    def ends(*pair):
        for fd in {*questions, *answers} - {*pair}:
            os.close(fd)
        return os.fdopen(pair[0], "r"), os.fdopen(pair[1], "w")

    # the tests first: in a process namespace the first process is the one whose end kills all others
    tests = start(
        "tests", alive, settings, private, lambda: run_tests(*ends(answers[0], questions[1]), *json.load(sys.stdin))
    )
    program = start("program", alive, settings, private, lambda: run_program(*ends(questions[0], answers[1])))
    for fd in (*questions, *answers):
        os.close(fd)
    return supervise(tests, program, box, watch_files=not private)


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))
