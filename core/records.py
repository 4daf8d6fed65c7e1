"""Files of records: JSON Lines, JSON arrays and Parquet, plain or gzipped, local or from the Hugging Face hub.

    for line, record in read_objects("alpaca.json.gz"): ...

Reading is strict: a broken line raises InputError with its file and line, and nothing after it is read.
"""

import codecs
import collections
import contextlib
import fnmatch
import glob
import gzip
import itertools
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NoReturn

from core.files import InputError, atomic_write, is_main, printable, warn_once

MAX_RECORD = 64 * 2**20  # largest line (in bytes) or object of an array (in characters)
CHUNK = 2**20  # bytes of an array read at a time
# {first bytes of a file that is not text: what to do with it}
MAGIC = {
    b"\x1f\x8b": "is compressed with gzip; give it a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd, which is not supported; decompress it",
    b"\xfd7zXZ": "is compressed with xz, which is not supported; decompress it",
    b"BZh": "is compressed with bzip2, which is not supported; decompress it",
    b"PK\x03\x04": "is a zip archive, which is not supported; unpack it",
    b"PAR1": "is a Parquet file; give it a name that ends in .parquet, without .gz",
    b"ARROW1": "is an Arrow file, which is not supported; save it as Parquet",
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file itself with git lfs pull",
}
# Keys that make_data.py adds to each example. Training ignores them, without a note if all are present
ORIGIN_KEYS = {"id", "source", "license", "language", "task_type", "category", "writer", "scores"}

# ---------------------------------------------------------------------------------------------------------------------
# Names of files


def expand(patterns: Iterable[str]) -> list[str]:
    """File names, globs and hf://datasets/OWNER/NAME[@REVISION]/FILE -> paths of local files, in order.

    Hub files are downloaded into the hub's cache. A file that is named twice is returned twice.
    """
    files = []
    for pattern in map(os.fspath, patterns):
        if pattern.startswith("hf://"):
            found = fetch(pattern)
        else:
            found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{pattern or 'an empty name'}: no such file")
        for path in found:
            if os.path.isdir(path):
                raise InputError(f"{path}: a folder; name its files, e.g. '{os.path.join(path, '*.json*')}'")
        files += found
    return files


def fetch(url: str) -> list[str]:
    """hf://datasets/OWNER/NAME[@REVISION]/FILE, where FILE may be a glob -> local paths of those files."""
    from huggingface_hub import HfApi, hf_hub_download

    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if not found:
        raise InputError(f"{url}: not hf://datasets/OWNER/NAME/FILE or hf://datasets/OWNER/NAME@REVISION/FILE")
    where = {"repo_id": found[1], "revision": found[2], "repo_type": "dataset"}
    try:
        names = [found[3]]
        if glob.has_magic(found[3]):
            names = sorted(fnmatch.filter(HfApi().list_repo_files(**where), found[3]))
        paths = [hf_hub_download(filename=name, **where) for name in names]
        with contextlib.suppress(Exception):  # it states the licence
            hf_hub_download(filename="README.md", **where)
    except Exception as e:  # network failures have many types
        why = " ".join(str(e).split())[:150]
        raise InputError(
            f"{url}: cannot be fetched: {type(e).__name__}: {why}; a gated data set needs HF_TOKEN"
        ) from None
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a regular file for reading bytes, decompressed if its name ends in .gz. InputError for anything else."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
            raise InputError(f"{path}: is {kind}; give a regular file")
        with gzip.open(path) if os.fspath(path).endswith(".gz") else open(path, "rb") as f:
            start = f.peek(32)[:32]
            kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
            if kind and not (start.startswith(b"PAR1") and os.fspath(path).endswith(".parquet")):
                raise InputError(f"{path}: {kind}")
            yield f
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None


def read_objects(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """Streams a file: (line number, object) of JSON Lines or a JSON array, (row number, object) of Parquet."""
    if os.fspath(path).endswith(".parquet"):
        yield from read_parquet(path)
        return
    if os.fspath(path).lower().endswith((".csv", ".tsv")):
        raise InputError(
            f"{path}: is a table such as CSV, which is not supported; convert it to JSON Lines, one object per line"
        )
    with open_bytes(path) as file:
        is_array = file.peek(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        yield from read_array(file, path) if is_array else json_lines(file, path)


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """Yields (line number, object) for each line of a JSON Lines file, plain or gzipped."""
    with open_bytes(path) as f:
        yield from json_lines(f, path)


def json_error(e: Exception) -> str:
    """Why json refused a text, on one line."""
    if isinstance(e, RecursionError):
        return "not JSON: nested too deeply"
    if isinstance(e, json.JSONDecodeError):
        return f"not JSON: {e}"
    return "not JSON: a number of too many digits"  # more than int() accepts


def json_lines(file: BinaryIO, path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """read_jsonl for an open file. Skips blank lines. path: for errors."""
    for number in itertools.count(1):
        line = file.readline(MAX_RECORD + 1)
        if not line:
            return
        if len(line) > MAX_RECORD:
            raise InputError(
                f"{path}:{number}: a line of more than {MAX_RECORD >> 20} MiB; one record per line is expected"
            )
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))  # some editors write a byte-order mark first
        except UnicodeDecodeError as e:
            raise InputError(f"{path}:{number}: not UTF-8: {e}; convert it first") from None
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}:{number}: {json_error(e)}; one object per line is expected") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path}:{number}: a {type(record).__name__}, not an object; one object per line is expected"
            )
        yield number, record


class ArrayText:
    """The text of a JSON array, read in chunks, so that a large file need not fit in memory and errors name a line.

    text[at:] is not parsed yet. line: the line number at `at`.
    """

    def __init__(self, file: BinaryIO, path: str | os.PathLike):
        self.file, self.path = file, path
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def fill(self) -> None:
        """Reads more. Doubles the pending text, so that the cost of scanning a long object stays linear."""
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.ended = not data
        try:
            self.text, self.at = self.text[self.at :] + self.decoder.decode(data, final=self.ended), 0
        except UnicodeDecodeError as e:
            self.fail(f"not UTF-8: {e}")

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.path}:{self.line}: {what}; an array of objects is expected")

    def advance(self, end: int) -> None:
        """Moves `at` to `end` and counts the lines between."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def next_char(self, end_allowed: bool = False) -> str:
        """Skips white space and returns the next character without reading it; "" at the end if end_allowed."""
        while True:
            rest = re.compile(r"\S").search(self.text, self.at)
            self.advance(rest.start() if rest else len(self.text))
            if rest:
                return rest[0]
            if self.ended and end_allowed:
                return ""
            if self.ended:
                self.fail("the file ends inside the array")
            self.fill()

    def next_object(self) -> dict:
        """Parses the object that begins at `at`."""
        while True:
            try:
                record, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as e:
                incomplete = isinstance(e, json.JSONDecodeError) and not self.ended
                if incomplete and len(self.text) - self.at <= MAX_RECORD:
                    self.fill()
                    continue
                if incomplete:
                    self.fail(f"an object of more than {MAX_RECORD >> 20} Mi characters, or one that never ends")
                self.advance(getattr(e, "pos", self.at))
                self.fail(json_error(e))
            self.advance(end)
            return record


def read_array(file: BinaryIO, path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """Yields (line number, object) of an open JSON array."""
    array, expected = ArrayText(file, path), "["
    while True:
        found = array.next_char()
        if found == "]" and expected == ",":
            break
        if found != expected:
            array.fail(f"not JSON: {found!r} where {expected!r} is expected")
        array.at += 1
        if array.next_char() == "]" and expected == "[":
            break
        if array.next_char() != "{":
            array.fail(f"not JSON: {array.next_char()!r} where an object is expected")
        line = array.line
        yield line, array.next_object()
        expected = ","
    array.at += 1
    if after := array.next_char(end_allowed=True):
        array.fail(f"not JSON: {after!r} after the end of the array")


def read_parquet(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """Yields (row number from 1, object) of a Parquet file. Needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    with open_bytes(path) as file:
        try:
            rows = (row for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
        except Exception as e:  # pyarrow's errors, and a time that Python cannot hold or whose zone it does not know
            why = f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"
            raise InputError(f"{path}: not a readable Parquet file: {why}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Records of training data


def is_number(value: object) -> bool:
    """True for an int or float that fits a finite float. False for a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_null(value: object) -> bool:
    """True for null, and for the NaN that pandas writes in its place."""
    return value is None or isinstance(value, float) and value != value


def is_empty(value: object) -> bool:
    """True for an empty text and an empty list."""
    return value == "" or value == []


class Fields(dict):
    """A record without its null values, which count as absent, as does pandas' NaN. unread: the keys never read."""

    def __init__(self, record: dict):
        super().__init__({key: value for key, value in record.items() if not is_null(value)})
        self.unread = set(self)

    def first_key(self, *keys: str) -> str | None:
        """The first of these keys whose value is not empty, else the first that is present, else None.

        Some tools fill the columns that a row does not have with "" or [].
        """
        present = [key for key in keys if key in self]
        return next((key for key in present if not is_empty(self[key])), next(iter(present), None))

    def first(self, *keys: str) -> object:
        """The value of first_key(*keys), else None."""
        key = self.first_key(*keys)
        self.unread -= {key, *(other for other in keys if is_empty(self.get(other)))}
        return self.get(key)


def read_records(paths: Iterable[str], parse: Callable) -> list[tuple[str, object]]:
    """All examples in all files: [("file:line", example)]. Prints the keys that were not read.

    parse(record, where) -> list of examples, such as sft_conversations or kto_examples of core.conversations. If
    records have several examples, each block of 1,000 records gives its first examples, then its second ones, and so
    on. This is TRL's order of unpaired preferences.
    """
    examples, files = [], expand(paths)
    for path in files:
        unread, before = collections.Counter(), len(examples)
        records = read_objects(path)
        while block := list(itertools.islice(records, 1000)):
            parsed = []
            for line, record in block:
                fields, where = Fields(record), f"{path}:{line}"
                parsed.append([(where, example) for example in parse(fields, where)])
                unread.update(fields.unread - (ORIGIN_KEYS | {"recorded"} if ORIGIN_KEYS <= record.keys() else set()))
            examples += [example for i in range(max(map(len, parsed))) for p in parsed for example in p[i : i + 1]]
        if len(examples) == before and len(files) > 1:
            warn_once(f"{path}: no records")
        if unread and is_main():
            keys = ", ".join(f"{printable(key[:60])} ({n:,})" for key, n in unread.most_common(12))
            keys += ", ..." * (len(unread) > 12)
            print(f"note: {path}: keys not read, and in how many records: {keys}")
    if not examples:
        raise InputError(f"{', '.join(map(os.fspath, paths))}: no records; nothing to train on")
    return examples


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Writes one JSON object per line. The file appears whole or not at all."""
    with atomic_write(path) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
