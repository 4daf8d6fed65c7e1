"""Runs an untrusted program and its tests in a sandbox: run_program().

sandbox_child.py runs the program in one process and the tests in another. Neither has any rights (confine.py). The
tests call the program's functions through two pipes and receive the results as data (values.py). So the program can
influence the verdict only through its return values.

Why not one `exec` of program and tests, as in HumanEval's own harness? There a program passes if it returns an object
that equals everything or replaces what the tests use, and it can read the expected values. Here the tests are never in
its process. tests/verification/test_hostile_programs.py has such programs.

Limits: a test that calls a second function of the program trusts that function too (HumanEval/32, 38 and 50 do).
Without tests, a program can fake that it ran to its end.

The files: sandbox_child.py starts the processes. program_side.py and tests_side.py run in them, values.py encodes their
messages, stand_ins.py has the tests' view of the program's objects, confine.py takes the rights away.
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
from collections.abc import Iterator

from verification import confine
from verification.stand_ins import UNCHECKABLE

OUTPUT_BYTES = 1 << 20  # limit of the program's output
CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")
LAYERS = confine.LAYERS  # layers of the confinement in use


def run_program(
    source: str, tests: str = "", entry_point: str | None = None, timeout: float = 10.0, memory_mb: int = 1024
) -> tuple[bool | None, str]:
    """Runs an untrusted Python program and its trusted tests -> (passed, detail). Needs POSIX.

    tests: Python code that sees the program's names. A program's name replaces a built-in one only if it is
    entry_point, the function under test. timeout: of both together, in seconds of wall time. memory_mb: address space
    of each process, in MiB.

    passed: True if program and tests ran to their end. None if the tests need something that cannot be checked from
    outside the program (stand_ins.py): the program may be right. Otherwise False. detail: the last line printed,
    usually an exception, or the reason why the run was ended.
    """
    # an unnamed file passes the tests on, so that no argument, variable or path leads the program to them
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
                os.killpg(child.pid, signal.SIGKILL)  # the process group: all processes of the sandbox
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
def temporary_folder() -> Iterator[str]:
    """Yields a new folder and removes it at the end, however deeply the folders in it are nested."""
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:
            subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)


def read_until(child: subprocess.Popen, deadline: float, timeout: float) -> tuple[bytes, str | None]:
    """Reads a child's output until it exits -> (output, None), or (output, reason) if it must be killed.

    deadline: a value of time.monotonic(). timeout: the seconds to name in the reason.
    """
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
