"""Run a program that nobody trusts, and tests of it: run_program.

sandbox_child.py, started as a script of its own, runs the program in one process and the tests in another; neither has
any rights (confine.py). The tests call the program's functions through two pipes and get their values back as data
(values.py). So the program can influence the verdict only through its return values. It cannot print a sign of success,
leave early, replace what the tests use, or return an object that claims to equal anything. The tests and their
expected values were never in its process.

Limits of this: a test that calls a second function of the program trusts that one as well (HumanEval/32, 38 and 50 do).
Without tests, only the program's own word says that it ran to its end.
"""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from verification import confine

OUTPUT_BYTES = 1 << 20  # most that a program may print
CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")
UNCHECKABLE = 3  # the child's exit status when the verdict is None
LAYERS = confine.LAYERS  # of the confinement; the tests leave some out


def run_program(
    source: str, tests: str = "", entry_point: str | None = None, timeout: float = 10.0, memory_mb: int = 1024
) -> tuple[bool | None, str]:
    """Run an untrusted Python program, then trusted tests of it; (passed, detail).

    passed: True if both ran to their end within `timeout` seconds of wall time, each in `memory_mb` MiB of address space;
    None if the tests need what cannot be checked from outside the program (stand_ins.py), so the program may be right. tests:
    they see the program's names, but none in place of a built-in function except entry_point, the function that they
    call. detail: the last line printed (usually an exception's), or what ended the run. Needs POSIX.
    """
    # the tests travel in an unnamed file: no argument, variable or path leads the program to them
    with temporary_folder() as box, tempfile.TemporaryFile() as handover:
        parts = [part.encode("utf-8", "replace").decode() for part in (source, tests)]
        handover.write(json.dumps([*parts, entry_point]).encode())
        handover.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", CHILD, str(os.getpid()), str(timeout), str(memory_mb), ",".join(LAYERS)],
            stdin=handover,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=box,
            env={},
            start_new_session=True,
        )
        try:
            output, ended_by = read_until(child, time.monotonic() + timeout, timeout)
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # the group: all processes of the sandbox
            except (ProcessLookupError, PermissionError):
                pass
            child.stdout.close()
            child.wait()
    if ended_by is None and child.returncode == 0:
        return True, "passed"
    lines = [line for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    if ended_by is None and child.returncode == UNCHECKABLE:
        return None, lines[-1][:500] if lines else "cannot be checked"
    if ended_by is None and child.returncode < 0:
        ended_by = f"killed by signal {-child.returncode}"
    return False, ended_by or (lines[-1][:500] if lines else f"exit code {child.returncode} before its end")


@contextlib.contextmanager
def temporary_folder():
    """A new folder, removed at the end however deep the folders in it are."""
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:
            subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)


def read_until(child, deadline, timeout):
    """Read what a child prints until it exits; (bytes, None), or (bytes, why) when it has to be ended."""
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return output, f"timed out after {timeout:g} s"
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            output += chunk
            if len(output) > OUTPUT_BYTES:
                return output, f"printed more than {OUTPUT_BYTES >> 20} MiB"
    try:
        child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return output, f"timed out after {timeout:g} s"
    return output, None
