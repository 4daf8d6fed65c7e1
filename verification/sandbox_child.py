"""The processes of the sandbox. sandbox.py starts this file: python -I sandbox_child.py PID TIMEOUT MEMORY LAYERS

The first process is the supervisor. It starts one process for the tests and one for the program, and watches the
program's threads and files. Its exit status is that of the tests. All three processes end if the caller PID ends.
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
from collections.abc import Callable
from typing import TextIO

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
from verification.program_side import serve_program  # noqa: E402
from verification.stand_ins import UNCHECKABLE, Uncheckable  # noqa: E402
from verification.tests_side import run_tests  # noqa: E402

del sys.path[0]

TOO_MANY_FILES = f"wrote more than {BOX_BYTES >> 20} MiB of files"


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start(
    role: str,
    alive: tuple[int, int],
    settings: tuple[float, int, tuple[str, ...]],
    private: str | None,
    run: Callable[[], None],
) -> int:
    """Forks a process that drops its rights and calls run(). -> its process id.

    role: "tests" or "program". alive: a pipe that the supervisor keeps open. settings: timeout in seconds, memory in
    MiB and the layers of the confinement. private: the private root folder, None without one.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.close(alive[1])
        die_with_parent()
        if select.select([alive[0]], [], [], 0)[0]:  # the supervisor has already ended
            os._exit(1)
        os.close(alive[0])
        if role == "program":  # descriptor 0 is the file that holds the tests
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        if private:
            enter_private_root(private)
        os.environ.update(TMPDIR=os.getcwd(), OMP_NUM_THREADS="1")  # numpy would otherwise start a thread per core
        timeout, memory_mb, layers = settings
        confine(timeout + 1, memory_mb, layers, watched=role == "program" and not private)
        run()
        status = 0
    except SystemExit:  # an early exit is a failure
        pass
    except Uncheckable as error:
        print(f"\ncannot be checked: {error}", flush=True)
        status = UNCHECKABLE
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def supervise(tests: int, program: int, box: str, watch_files: bool) -> int:
    """Waits for the tests' process, then ends the program's process. -> the exit status of the tests.

    tests, program: process ids. box: the working folder. watch_files: limit the folder's size by watching it.
    """
    interval, codes, reason = 0.02 if watch_files else 0.05, {}, None
    while tests not in codes and not reason:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        if program not in codes:
            reason = exceeded_limit(program, box, watch_files)
        if tests not in codes and not reason:
            wait_for_child(interval)
    for process in {program, tests} - {*codes}:
        os.kill(process, signal.SIGKILL)
    while len(codes) < 2:  # in any order: the first process of a process namespace ends last
        ended, status = os.waitpid(-1, 0)
        codes[ended] = os.waitstatus_to_exitcode(status)
    if watch_files and not reason and box_bytes(box) > BOX_BYTES:
        reason = TOO_MANY_FILES
    code = 1 if reason else codes[tests]
    if reason or code < 0:
        print(reason or f"killed by signal {-code}", flush=True)
    return 1 if code < 0 else code


def wait_for_child(seconds: float) -> None:
    """Sleeps until a child ends, for at most this time."""
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait([signal.SIGCHLD], seconds)
    else:
        time.sleep(min(seconds, 0.01))


def exceeded_limit(pid: int, box: str, watch_files: bool) -> str | None:
    """The limit that the program exceeds, in words. None if it exceeds none."""
    with contextlib.suppress(OSError):  # the process has ended, or there is no /proc
        if os.stat(f"/proc/{pid}/task").st_nlink - 2 > THREADS:
            return f"started more than {THREADS} threads"
    if watch_files and box_bytes(box) + deleted_bytes(pid, box) > BOX_BYTES:
        return TOO_MANY_FILES
    return None


def file_bytes(status: os.stat_result) -> int:
    """The bytes counted for a file: its size or its blocks, whichever is larger, and at least BOX_BYTES / BOX_FILES."""
    return max(BOX_BYTES // BOX_FILES, status.st_size, 512 * status.st_blocks)


def box_bytes(box: str) -> float:
    """Bytes of all files and folders in a folder. Infinite if a part cannot be read or is nested too deeply."""
    size = 0

    def count_unreadable(error):
        nonlocal size
        if not isinstance(error, FileNotFoundError):  # a file that was deleted meanwhile does not count
            size = float("inf")

    try:
        for folder, folders, names in os.walk(box, onerror=count_unreadable):
            for name in names + folders:
                with contextlib.suppress(FileNotFoundError):
                    size += file_bytes(os.lstat(os.path.join(folder, name)))
            if size > BOX_BYTES:
                break
    except (OSError, RecursionError):  # a path that is too long, or folders nested too deeply
        return float("inf")
    return size


def deleted_bytes(pid: int, box: str) -> int:
    """Bytes of deleted files that a process still holds open or mapped. A mapped file counts as FILE_BYTES."""
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


def main(caller: str, timeout: str, memory_mb: str, layers: str) -> int:
    """Starts the tests and the program and supervises them -> the exit status."""
    settings = float(timeout), int(memory_mb), tuple(layers.split(","))
    die_with_parent()
    if os.getppid() != int(caller):  # the caller has already ended
        return 1
    box = os.path.realpath(os.getcwd())
    private = box if "namespaces" in settings[2] and make_private_root(box) else None
    die_with_parent()  # again, because a new user namespace clears it
    if os.getppid() != int(caller):
        return 1
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    alive, questions, answers = os.pipe(), os.pipe(), os.pipe()

    def open_pipes(*pair: int) -> tuple[TextIO, TextIO]:
        """Opens the two descriptors of this process and closes those of the other one."""
        for fd in {*questions, *answers} - {*pair}:
            os.close(fd)
        return os.fdopen(pair[0], "r"), os.fdopen(pair[1], "w")

    # the tests start first: the end of a process namespace's first process kills all others in it
    tests = start(
        "tests",
        alive,
        settings,
        private,
        lambda: run_tests(*open_pipes(answers[0], questions[1]), *json.load(sys.stdin)),
    )
    program = start("program", alive, settings, private, lambda: serve_program(*open_pipes(questions[0], answers[1])))
    for fd in (*questions, *answers):
        os.close(fd)
    return supervise(tests, program, box, watch_files=not private)


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))
