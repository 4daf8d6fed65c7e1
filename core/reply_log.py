"""The reply log: an append-only JSON Lines file that keeps each model reply as soon as it arrives.

    with ReplyLog("out/replies.jsonl", {"text": str}) as log:
        if key not in log:
            log.append(key, {"text": "Paris"})
        record = log[key]

A run that is killed and restarted finds every reply that was written. Each line is one object: its "key" in
hexadecimal, usually the SHA-256 of the request, then the record. Only keys and file offsets are in memory, so a log may
hold millions of replies.
"""

import collections.abc
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO

from core.files import InputError, is_main, lock


class ReplyLog(collections.abc.Mapping):
    """A mapping from key to record. If a key was appended twice, the last record counts.

    fields: the name and type of each field that every record must have. spent: [prompt tokens, reply tokens], summed
    over the records' "usage". read_only: take no lock and change nothing; a missing file is an empty log.

    Opening creates and locks the file. A last line without a newline was cut off by a kill and is removed. Closing
    removes the file and the folders made for it if nothing was appended.

    InputError if another process has this log open, if a line is damaged, or if the file cannot be used.
    """

    def __init__(self, path: str | os.PathLike, fields: dict[str, type], read_only: bool = False):
        self.path, self.fields = os.fspath(path), fields
        self.offsets: dict[bytes, int] = {}  # key -> where its line starts
        self.spent = [0, 0]
        self.made_folders: list[str] = []
        self.file = self.reader = None
        try:
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                raise InputError(f"{self.path}: is not a regular file; choose another --out")
            if not read_only:
                self.made_folders = make_folders(os.path.dirname(os.path.abspath(self.path)))
                self.file = open_locked(self.path)
            if self.file or os.path.exists(self.path):
                self.reader = open(self.path, "rb")
                self._read_offsets()
        except OSError as e:
            self.close()
            doing = "read" if read_only else "written"
            raise InputError(f"{self.path}: cannot be {doing}: {e.strerror or e}; choose another --out") from None
        except BaseException:
            self.close()
            raise

    def _read_offsets(self) -> None:
        offset = 0
        for number, line in enumerate(self.reader, 1):
            if not line.endswith(b"\n"):
                if self.file:
                    self.file.truncate(offset)
                break
            try:
                record = json.loads(line)
                if not all(isinstance(record[name], kind) for name, kind in self.fields.items()):
                    raise ValueError
                self._count(record.get("usage"))
                self.offsets[bytes.fromhex(record["key"])] = offset
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f"{self.path}:{number}: not a reply; delete this line to ask again") from None
            offset += len(line)

    def _count(self, usage: list[int] | None) -> None:
        if usage:
            self.spent = [total + n for total, n in zip(self.spent, usage, strict=True)]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bytes.fromhex(key) in self.offsets

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[str]:
        return (key.hex() for key in self.offsets)

    def __getitem__(self, key: str) -> dict:
        self.reader.seek(self.offsets[bytes.fromhex(key)])
        return json.loads(self.reader.readline())

    def append(self, key: str, record: dict) -> None:
        """Writes the record to the file before it returns.

        InputError if the disk is full. The log then ends with its last whole line.
        """
        data = json.dumps({"key": key, **record}).encode() + b"\n"  # ASCII: a cut cannot split a character
        offset = os.fstat(self.file.fileno()).st_size
        try:
            left = memoryview(data)
            while left:  # a write may be partial
                left = left[self.file.write(left) :]
        except OSError as e:
            with contextlib.suppress(OSError):
                self.file.truncate(offset)
            raise InputError(
                f"{self.path}: cannot be written: {e.strerror}; make room and run the same command to continue"
            ) from None
        self.offsets[bytes.fromhex(key)] = offset
        self._count(record.get("usage"))

    def close(self) -> None:
        if self.reader:
            self.reader.close()
        if self.file and not self.file.closed:
            with contextlib.suppress(OSError):
                if os.fstat(self.file.fileno()).st_size == 0:
                    os.remove(self.path)  # before the lock is released
            self.file.close()
        for folder in self.made_folders:
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                os.rmdir(folder)
        self.made_folders = []

    def __enter__(self) -> "ReplyLog":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind in (KeyboardInterrupt, SystemExit) and len(self) and is_main():  # Ctrl-C or SIGTERM
            kept = f"stopped: {len(self):,} replies are kept in {self.path}"
            print(f"{kept}; the same command continues", file=sys.stderr)
        self.close()


def make_folders(folder: str) -> list[str]:
    """Makes a folder and its parents. -> the folders that were missing, the innermost first."""
    missing, path = [], folder
    while not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    return missing


def open_locked(path: str) -> BinaryIO:
    """Opens a file for appending, unbuffered, and locks it. The system releases the lock when the process ends."""
    while True:
        file = open(path, "a+b", buffering=0)
        if lock(file.fileno()) is False:
            file.close()
            raise InputError(f"{path}: another run is using this folder; wait for it or choose another --out")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # another run removed its empty log between open and lock: try again
