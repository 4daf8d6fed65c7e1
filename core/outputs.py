"""Output folders. Replaces files that this project wrote, and never touches others.

The MANIFEST in an output folder lists the files that each command wrote there and may replace. All other files in the
folder belong to the user.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator

from core.files import (
    ESCAPE,
    InputError,
    atomic_write,
    check_utf8,
    dead_temporaries,
    lock,
    parse_temporary,
    read_json,
    same_path,
    temporary_path,
)

MANIFEST = ".written.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
LONGEST_NAME = 100  # maximum bytes of a path inside an output folder or OUT.run/, with its temporary name
MAX_NEW_FOLDERS = 100  # maximum number of folders that a command makes, one inside the other
# Text files beside weights and config.json that a checkpoint passes on to the checkpoints made from it
SIDE_FILES = (
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja"
).split()


# ---------------------------------------------------------------------------------------------------------------------
# The manifest: {"files": {file name: the writer}, "card": SHA-256 of the README.md that we wrote}


def valid_manifest(folder: str) -> dict | None:
    """The manifest of a folder. None if there is none, or if this project did not write it."""
    try:
        manifest = read_json(os.path.join(folder, MANIFEST))
        names = manifest["files"]
        if all(os.path.basename(name) == name and isinstance(writer, str) for name, writer in names.items()):
            return {"files": names, "card": manifest.get("card")}
    except (InputError, KeyError, TypeError, AttributeError):
        pass
    return None


def read_manifest(folder: str) -> dict:
    """valid_manifest, or an empty manifest."""
    return valid_manifest(folder) or {"files": {}, "card": None}


def check_manifest(folder: str) -> None:
    """InputError if a file with the manifest's name is in the folder, and this project did not write it."""
    path = os.path.join(folder, MANIFEST)
    if os.path.lexists(path) and valid_manifest(folder) is None:
        raise InputError(f"{path}: was not written by this project; move it, or give another --out")


def write_manifest(folder: str, manifest: dict) -> None:
    with atomic_write(os.path.join(folder, MANIFEST)) as f:
        json.dump(manifest, f, indent=1, ensure_ascii=False)


def written_files(folder: str, writer: str) -> set[str]:
    """The names of the files in a folder that `writer` wrote, without a model card that the user has edited."""
    manifest = read_manifest(folder)
    names = {name for name, by in manifest["files"].items() if by == writer}
    card = os.path.join(folder, CARD)
    if os.path.isfile(card):  # a pipe would block
        with contextlib.suppress(OSError), open(card, "rb") as f:
            if hashlib.sha256(f.read()).hexdigest() != manifest["card"]:
                names.discard(CARD)
    return names


def foreign_entries(folder: str) -> list[str]:
    """Files and folders in `folder` that are not part of our checkpoint, sorted, without our temporary files."""
    others = {*os.listdir(folder)} - written_files(folder, "checkpoint") - {MANIFEST}
    return sorted(name for name in others if not parse_temporary(name))


def write_card(folder: str, text: str) -> None:
    """Writes the model card of a new checkpoint folder, after its SHA-256 is in the manifest."""
    write_manifest(folder, read_manifest(folder) | {"card": hashlib.sha256(text.encode(errors=ESCAPE)).hexdigest()})
    with open(os.path.join(folder, CARD), "xb") as f:
        f.write(text.encode(errors=ESCAPE))
        os.fsync(f.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the work begins


def is_inside(path: str, folder: str) -> bool:
    """True if `path` is `folder` or inside it, after following symbolic links."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([path, folder]) == folder


def check_writable(path: str, flag: str = "--out") -> None:
    """InputError, naming the flag, unless a file can be created beside `path`, after its missing folders are made.

    Neither a name nor the whole path may be too long for the file system. The temporary name is longer than the name
    itself, and a folder holds files of up to LONGEST_NAME bytes.
    """
    check_utf8(path)
    temporary = temporary_path(os.path.realpath(path))
    parent = os.path.dirname(temporary)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    names = os.path.relpath(temporary, parent).split(os.sep)  # the missing folders and the temporary name
    if len(names) > MAX_NEW_FOLDERS:
        raise InputError(f"{path}: is nested in {len(names) - 1:,} new folders; give another {flag}")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
        for new in (*names, os.path.join(*names, "x" * LONGEST_NAME)):
            with contextlib.suppress(FileNotFoundError):
                os.lstat(os.path.join(parent, new))
    except OSError as e:
        raise InputError(f"{path}: nothing can be written in {parent} ({e.strerror}); give another {flag}") from None


def check_replaceable(path: str) -> None:
    """InputError if this process may not replace the folder at `path`: read-only, or another user's."""
    info, parent = os.stat(path), os.stat(os.path.dirname(os.path.realpath(path)))
    protected = parent.st_mode & stat.S_ISVTX and os.geteuid() not in (0, parent.st_uid, info.st_uid)
    if protected or not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: belongs to another user or is read-only; give another --out")


def check_file(path: str, mark: str) -> None:
    """InputError unless `path` may be written: it is absent, empty, or a file of ours (it contains the text `mark`)."""
    check_writable(path)
    if not os.path.lexists(path):
        return
    if not os.path.isfile(path):
        raise InputError(f"{path}: is not a regular file; give another --out")
    try:
        with open(path, "rb") as f:
            content = f.read()
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}; give another --out") from None
    if content and mark.encode() not in content:
        raise InputError(f"{path}: exists and was not written by this command; give another --out, or move the file")


def check_inputs(out: str, inputs: Iterable[str]) -> None:
    """InputError if `out` is an input, is inside one, or has one inside: writing it would change that input."""
    for path in filter(os.path.exists, inputs):
        if same_path(out, path):
            raise InputError(f"--out {out}: is one of the inputs; use another name")
        if is_inside(out, path):
            raise InputError(f"--out {out}: is inside the input {path}; use another place")
        if is_inside(path, out):
            raise InputError(f"--out {out}: has the input {path} inside; use another name")


def check_folder(folder: str, writer: str, names: Iterable[str]) -> None:
    """InputError unless `writer` can write these files in `folder`: each is absent, or `writer` wrote it before."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise InputError(f"{folder}: is a file; give a folder as --out")
    check_writable(os.path.join(folder, MANIFEST))
    check_manifest(folder)
    own = written_files(folder, writer)
    for name in names:
        path = os.path.join(folder, name)
        if name not in own and os.path.lexists(path):
            raise InputError(f"{path}: was not written by {writer}; move it, or give another --out")


def claim_folder(folder: str, writer: str, names: Iterable[str]) -> None:
    """Makes `folder`, records in its manifest that `writer` owns these files, and removes leftovers of killed runs.

    InputError as in check_folder.
    """
    names = list(names)
    check_folder(folder, writer, names)
    manifest = read_manifest(folder)
    write_manifest(folder, manifest | {"files": manifest["files"] | dict.fromkeys(names, writer)})
    remove_leftovers(folder)


@contextlib.contextmanager
def claimed_folder(folder: str, writer: str, names: Iterable[str]) -> Iterator[None]:
    """claim_folder, undone at the end if none of the files was written, so that a refused run leaves nothing."""
    names, before, existed = list(names), read_manifest(folder), os.path.exists(folder)
    claim_folder(folder, writer, names)
    try:
        yield
    finally:
        if not before["files"] and not any(os.path.lexists(os.path.join(folder, name)) for name in names):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, MANIFEST))
                if not existed:
                    os.rmdir(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Leftovers of killed runs


def remove_leftovers(folder: str, name: str | None = None) -> None:
    """Removes the temporary files of `name` (None: of all names) in `folder` whose writing process is gone.

    A leftover has a name made by temporary_path(), and no process holds its lock. A user's files inside a leftover
    folder move to the folder that the leftover was made for.
    """
    for path, found in dead_temporaries(folder, name):
        with contextlib.suppress(OSError):
            remove_leftover(path, os.path.join(folder, found["name"]), found["kind"])


def remove_leftover(path: str, target: str, kind: str) -> None:
    if not os.path.isdir(path):
        os.remove(path)
    elif kind == "old" and not os.path.lexists(target):  # killed between the two renames of replace_folder
        os.rename(path, target)
    else:
        if os.path.isdir(target):
            move_foreign(path, target)
        remove_written(path)


def move_foreign(source: str, target: str) -> None:
    """Moves all files that are not part of our checkpoint from one folder to the other, unless the name is taken."""
    for name in foreign_entries(source):
        if not os.path.lexists(os.path.join(target, name)):
            os.rename(os.path.join(source, name), os.path.join(target, name))


def remove_written(folder: str) -> None:
    """Removes a checkpoint folder: the files in its manifest, then the folder itself if it is empty."""
    remove_leftovers(folder)
    for name in written_files(folder, "checkpoint"):
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, name))
    with contextlib.suppress(OSError):  # there is no manifest if the run was killed before it was written
        if not foreign_entries(folder):
            os.remove(os.path.join(folder, MANIFEST))
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def discard_checkpoint(path: str) -> None:
    """Removes a checkpoint that this project wrote, a folder or a .pt file.

    A folder is renamed first, so that a kill leaves no partial checkpoint.
    """
    if os.path.isdir(path):
        if "config.json" not in written_files(path, "checkpoint"):
            return
        os.rename(path, hidden := temporary_path(path))
        remove_written(hidden)
    elif os.path.exists(path):
        os.remove(path)


# ---------------------------------------------------------------------------------------------------------------------
# Replacing a folder


@contextlib.contextmanager
def atomic_folder(out: str, names: Iterable[str]) -> Iterator[str]:
    """Yields a new, empty folder for the files `names`. At the end it replaces the checkpoint at `out` in one step.

    The user's files in `out` stay as they are. After an error, nothing is left or changed.
    """
    out = os.path.realpath(out)
    temporary, fd = temporary_path(out), None
    try:
        try:
            os.makedirs(os.path.dirname(out), exist_ok=True)
            fd = make_locked_folder(temporary)
            write_manifest(temporary, {"files": dict.fromkeys(names, "checkpoint"), "card": None})
        except OSError as e:
            raise InputError(f"{out}: cannot be written: {e.strerror}") from None
        yield temporary
        try:
            replace_folder(temporary, out)
        except OSError as e:
            raise InputError(f"{out}: cannot be replaced: {e.strerror}; give another --out") from None
    finally:
        if os.path.isdir(temporary):
            remove_leftover(temporary, out, "tmp")
        if fd is not None:
            os.close(fd)


def make_locked_folder(path: str) -> int:
    """Makes a folder and locks it. -> its file descriptor."""
    while True:
        os.mkdir(path)
        with contextlib.suppress(FileNotFoundError):  # another run removed it as a leftover before it was locked
            fd = os.open(path, os.O_RDONLY)
            lock(fd, wait=True)
            if os.path.isdir(path):
                return fd
            os.close(fd)


def replace_folder(temporary: str, out: str) -> None:
    """Renames the folder `temporary` to `out`. The old checkpoint at `out` is removed, the user's files are kept."""
    if not os.path.isdir(out):
        os.rename(temporary, out)
        return
    card = os.path.join(temporary, CARD)
    if CARD in foreign_entries(out) and os.path.exists(card):
        os.remove(card)  # the user's own README.md stays
    keep_other_writers(temporary, out)
    taken = {*foreign_entries(out)} & {*os.listdir(temporary)}
    if taken:
        raise InputError(f"{out}/{min(taken)}: was not written by this project; move it, or give another --out")
    shutil.copymode(out, temporary)
    fd = os.open(out, os.O_RDONLY)
    try:
        lock(fd)
        old = temporary
        if not swap_folders(temporary, out):
            os.rename(out, old := temporary_path(out, "old"))
            try:
                os.rename(temporary, out)
            except OSError:
                os.rename(old, out)
                raise
        move_foreign(old, out)
        remove_written(old)
    finally:
        os.close(fd)


def keep_other_writers(temporary: str, out: str) -> None:
    """Writes the final manifest of a new checkpoint: its own files, and those that other commands wrote in `out`."""
    own = {name: "checkpoint" for name in os.listdir(temporary) if name != MANIFEST}
    others = {name: by for name, by in read_manifest(out)["files"].items() if by != "checkpoint"}
    write_manifest(temporary, {"files": others | own, "card": read_manifest(temporary)["card"]})


def swap_folders(first: str, second: str) -> bool:
    """Swaps two folders in one step, with renameat2 of Linux. False where the system or the disk has no such call."""
    if sys.platform != "linux":
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        return ctypes.CDLL(None).renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0
    except AttributeError:
        return False


def check_checkpoint_path(out: str) -> None:
    """InputError unless a checkpoint can be written at `out`. Does not look into an existing .pt file."""
    path = os.path.realpath(out)
    if os.path.basename(out.rstrip("/")) in ("", ".", "..") or is_inside(os.getcwd(), path):
        raise InputError(f"--out {out}: is the current folder or contains it; give the name of a new folder")
    check_writable(out)
    if out.endswith(".pt"):
        if os.path.isdir(path):
            raise InputError(f"{out}: is a folder; a .pt checkpoint is a file; give another --out")
        return
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f"{out}: is a file; give a folder, or a name that ends in .pt, as --out")
    if os.path.isdir(path):
        check_replaceable(path)
        check_manifest(path)
        foreign = foreign_entries(path)
        if foreign and "config.json" not in written_files(path, "checkpoint"):
            raise InputError(f"{out}: exists and is no checkpoint that this project wrote; give another --out")
        for name in foreign:
            if name in (*SIDE_FILES, "config.json", INDEX) or name.endswith(".safetensors"):
                raise InputError(f"{out}/{name}: was not written by this project; move it, or give another --out")
