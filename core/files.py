"""Reads and writes files: bad input ends with one error line, and each file appears whole or not at all."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO

from core.interrupt import ROOT, exit_silently

MAX_TEXT = 2**28  # maximum bytes of a text file; ten times the largest published tokenizer.json
MAX_ERROR = 2000  # maximum characters of an error line
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # without tab and newline
ESCAPE = "backslashreplace"  # error handler of text: half of a surrogate pair is written as an escape


class InputError(Exception):
    """Bad input from outside. The message is one line: the file, its line, the fault, what to do. cli() prints it."""


def printable(text: str) -> str:
    """The text as one line for a terminal: control characters become escapes, and the middle of a long text is cut."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = MAX_ERROR // 2
    return line if len(line) <= MAX_ERROR else f"{line[:half]} ... {line[-half:]}"


def visible(text: str) -> str:
    """A model's text for stdout. A terminal would obey its control characters, so there all but newline and tab become
    escapes. Files and pipes get the text unchanged.
    """
    if not (sys.stdout and sys.stdout.isatty()):
        return text
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: object) -> str:
    """A value as JSON for an error line: ASCII, at most 60 characters."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits, or nested too deeply
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def cli(main: Callable[[], object]) -> None:
    """Runs a script's main(). Exit codes: 2 for bad input, 130 for Ctrl-C, 141 for a closed stdout, 143 for SIGTERM."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    silent = is_main_thread and signal.getsignal(signal.SIGINT) is exit_silently  # see core/interrupt.py
    if is_main_thread:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files are removed
    for name in ("stdout", "stderr"):  # closed, as with 2>&-: a file opened later would take the place of the stream
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):  # a terminal that shows ASCII only gets escapes, not a UnicodeEncodeError
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors=ESCAPE)
    with contextlib.suppress(AttributeError, ValueError):  # bytes that are not UTF-8 in a chat's input
        sys.stdin.reconfigure(errors="replace")
    try:
        if silent:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run_main(main)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if silent:  # while the interpreter exits, which takes a moment with torch
            signal.signal(signal.SIGINT, exit_silently)


def run_main(main: Callable[[], object]) -> None:
    """cli() without its handling of signals."""
    try:
        check_current_folder()
        try:
            main()
        finally:
            if sys.stdout and not sys.stdout.closed:
                sys.stdout.flush()  # raises for a closed pipe here, not while the interpreter exits
    except InputError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun all ranks of a machine raise the same error
            print(f"error: {printable(str(e))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        discard_output()
        sys.exit(141)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # EFBIG: ulimit -f
            raise
        with contextlib.suppress(OSError):  # stderr may be on the same disk
            print(f"error: the output cannot be written: {e.strerror}; make room", file=sys.stderr)
        discard_output()
        sys.exit(2)


def check_current_folder() -> None:
    """InputError if the current folder has been removed: torch cannot be imported there."""
    try:
        os.getcwd()
    except OSError as e:
        raise InputError(f"the current folder: {e.strerror}; change to another folder") from None


@functools.cache
def warn_once(text: str) -> None:
    """Prints a warning to stderr, once per process and on one rank per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {printable(text)}", file=sys.stderr)


def check_arguments(parse: Callable[[], object]) -> None:
    """Parses a script's arguments before it loads torch, so that --help and wrong flags are answered at once.

    Ends the process if the arguments are wrong. Otherwise the script goes on; its main() parses them again.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cli(parse)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def is_main() -> bool:
    """True in the process that prints and writes files: rank 0, or the only process without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def print0(text: str) -> None:
    """Prints a line, on rank 0 only."""
    if is_main():
        print(text)


def print_next(*words: str) -> None:
    """Prints a command to run next, quoted for the shell. A file named -x becomes ./-x, which is no flag."""
    print(f"next: {shlex.join(f'./{w}' if w.startswith('-') and os.path.lexists(w) else w for w in words)}")


def discard_output() -> None:
    """Points stdout and stderr at /dev/null, so that the interpreter's last flush cannot fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            os.dup2(null, stream.fileno())
    os.close(null)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def check_utf8(path: str | os.PathLike) -> None:
    """InputError for a name that is not UTF-8: safetensors and torch cannot open it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: the name is not UTF-8; rename it") from None


def check_unicode(text: str, where: str) -> None:
    """InputError for half of a surrogate pair, such as a lone \\ud83d in JSON. No tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half of a surrogate pair; correct it") from None


def check_regular(path: str | os.PathLike) -> None:
    """InputError for a name that is not UTF-8, and for a FIFO, device or socket, which could block forever.

    A missing file is left to open().
    """
    check_utf8(path)
    with contextlib.suppress(OSError, ValueError):
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a pipe, device or socket; give a regular file")


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file of at most MAX_TEXT bytes. A byte order mark is dropped from a .json file."""
    check_regular(path)
    try:
        if os.path.getsize(path) > MAX_TEXT:
            raise InputError(
                f"{path}: is larger than {MAX_TEXT >> 20} MiB, too large for a file of this kind; download it again"
            )
        with open(path, encoding="utf-8-sig" if str(path).endswith(".json") else "utf-8") as f:
            return f.read()
    except (OSError, ValueError) as e:  # ValueError: not UTF-8, or a name with a null character
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"{path}: cannot be read as text ({reason}); correct it, or download it again") from None


def json_object(text: str, where: str | os.PathLike) -> dict:
    """The dict of a JSON text. where: the file, for the error."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: cannot be read as JSON ({e}); correct it, or download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object in a file."""
    return json_object(read_text(path), path)


def code_hash(*names: str) -> str:
    """SHA-256 of the source of files and folders, relative to the repository."""
    paths = [os.path.join(ROOT, name) for name in names]
    files = {path for path in paths if path.endswith(".py")}
    for folder in filter(os.path.isdir, paths):
        files |= {os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".py")}
    return hashlib.sha256("".join(read_text(path) for path in sorted(files)).encode()).hexdigest()


def same_path(a: str | os.PathLike, b: str | os.PathLike) -> bool:
    """True if both paths lead to the same file or folder."""
    return os.path.realpath(a) == os.path.realpath(b)


# ---------------------------------------------------------------------------------------------------------------------
# Writing. A file is written under a temporary name and renamed when it is complete. The writer holds a lock on it. A
# temporary file without a lock was left by a killed process. The next write of the same file removes it.

TEMPORARY = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)(?P<token>[0-9a-f]{8})(?P<check>[0-9a-f]{8})", re.DOTALL)


def temporary_path(path: str, kind: str = "tmp") -> str:
    """A new name beside `path`. Its check digits distinguish it from a user's file with a similar name."""
    token = os.urandom(4).hex()
    return f"{path}.{kind}{token}{check_digits(os.path.basename(path), token)}"


def check_digits(name: str, token: str) -> str:
    return hashlib.sha256(os.fsencode(f"{name} {token}")).hexdigest()[:8]


def parse_temporary(entry: str) -> re.Match | None:
    """The parts of a name made by temporary_path(); None for any other name."""
    found = TEMPORARY.fullmatch(entry)
    return found if found and check_digits(found["name"], found["token"]) == found["check"] else None


def lock(fd: int, wait: bool = False) -> bool | None:
    """Locks an open file until it is closed. -> False if another process holds the lock, None on a disk without locks.

    wait: waits for the other process instead.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_locked(path: str | os.PathLike) -> bool:
    """True if another process holds the lock of this file. False without such a file."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        return lock(f.fileno()) is False


def dead_temporaries(folder: str, name: str | None) -> Iterator[tuple[str, re.Match]]:
    """Yields (path, parts of its name) of the temporary files and folders of `name` whose writing process is gone.

    name: None for all names. Each is locked until the next one is asked for. Empty if there is no such folder.
    """
    if not os.path.isdir(folder):
        return
    for entry in os.listdir(folder):
        found = parse_temporary(entry)
        if not found or name not in (None, found["name"]):
            continue
        path = os.path.join(folder, entry)
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if lock(fd):
                    yield path, found
            finally:
                os.close(fd)


def remove_dead_files(path: str) -> None:
    """Removes the temporary files for `path` of killed processes."""
    for dead, _ in dead_temporaries(os.path.dirname(path), os.path.basename(path)):
        with contextlib.suppress(OSError):  # a folder is left to core/outputs.py
            os.remove(dead)


def open_temporary(temporary: str, path: str, mode: str) -> IO:
    """A new, locked file `temporary`, with the permissions of `path` if it exists, else the umask's."""
    while True:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": ESCAPE}
        f = open(temporary, mode.replace("w", "x"), **text)
        lock(f.fileno(), wait=True)
        if os.fstat(f.fileno()).st_nlink:  # else another run removed it as a leftover before it was locked
            break
        f.close()
    with contextlib.suppress(OSError):
        os.fchmod(f.fileno(), stat.S_IMODE(os.stat(path).st_mode))
    return f


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file for `path` and renames it to `path` at the end. An error leaves and changes nothing.

    A symbolic link stays, and the file it points to is replaced. Raises InputError if the file cannot be written.
    """
    path = os.path.realpath(path)
    temporary = temporary_path(path)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        remove_dead_files(path)
        with open_temporary(temporary, path, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
            os.replace(temporary, path)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
