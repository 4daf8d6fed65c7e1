"""Files in and out: whole or not at all; bad input as one line and exit code 2."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class InputError(Exception):
    """Bad input from outside. The message is one line: file, line, what is wrong, what to do. See cli()."""


def cli(main):
    """Runs a script's main(). Bad input ends with one line on stderr and exit code 2, Ctrl-C with 130, SIGTERM with 143."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # by the way out, on which half-written files are removed
    try:
        main()
    except InputError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun the ranks of a machine meet the same error
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Opens a temporary file beside `path`; on success it takes the name, on failure nothing is left."""
    path = os.path.abspath(path)
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(temporary)


def append(f, data):
    """Writes data to the end of a file that keeps what was done so far, at once."""
    try:
        f.write(data)
        f.flush()
    except OSError as e:
        raise InputError(
            f"{f.name}: cannot be written: {e.strerror}; make room and run the same command to go on"
        ) from None


def read_text(path):
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"{path}: cannot be read as text ({getattr(e, 'strerror', None) or e}); mend it, or fetch it again"
        ) from None


def code_hash(*more):
    """SHA-256 of the source of model.py, core/, training/ and `more`: files or rooms, by their paths in the repository."""
    paths = [os.path.join(ROOT, name) for name in ("model.py", "core", "training", *more)]
    files = {path for path in paths if path.endswith(".py")}
    files |= {
        os.path.join(room, name)
        for room in paths
        if os.path.isdir(room)
        for name in os.listdir(room)
        if name.endswith(".py")
    }
    return hashlib.sha256("".join(read_text(path) for path in sorted(files)).encode()).hexdigest()


def json_object(text, where):
    """The dict of a JSON text. where: the file, for the error."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: cannot be read as JSON ({e}); mend it, or fetch it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_json(path):
    return json_object(read_text(path), path)


def same_path(a, b):
    """Whether two paths are of one file or directory."""
    return os.path.realpath(a) == os.path.realpath(b)


def check_out(out):
    """InputError unless a checkpoint can be written there. Asked before the work, so that the work is not lost."""
    path = parent = os.path.realpath(out)
    if out.endswith(".pt") and os.path.isdir(path):
        raise InputError(f"{out}: is a directory; a .pt checkpoint is a file; give another --out")
    if not out.endswith(".pt") and os.path.isfile(path):
        raise InputError(f"{out}: is a file; give a directory, or a name that ends in .pt, as --out")
    if os.path.isdir(path) and os.listdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise InputError(f"{out}: exists and is no checkpoint; give another --out")
    while not os.path.exists(parent := os.path.dirname(parent)):
        pass
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise InputError(f"{out}: nothing can be written in {parent}; give another --out")


@contextlib.contextmanager
def atomic_directory(out):
    """Gives a directory beside `out` to write in; on success it takes the name of out, on failure nothing is left."""
    check_out(out)
    out = os.path.realpath(out)  # of a link it is what the link points to that is replaced
    temporary = f"{out}.tmp{os.getpid()}"
    try:
        yield temporary
        try:
            if os.path.isdir(out):  # rename cannot replace a directory that is not empty
                os.rename(out, f"{temporary}.old")
            os.rename(temporary, out)
        except OSError as e:
            raise InputError(f"{out}: cannot be replaced: {e.strerror}; give another --out") from None
    finally:
        for leftover in (temporary, f"{temporary}.old"):
            shutil.rmtree(leftover, ignore_errors=True)
