"""Files of records: what is read, and how broken, huge and odd ones are refused."""

import bz2
import gzip
import json
import lzma
import os
import socket

import pytest
from conftest import write_lines

from core import records
from core.conversations import sft_conversations
from core.files import InputError
from core.records import ORIGIN_KEYS, expand, read_jsonl, read_objects, read_records

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "春", "completion": "d\n"}, {"prompt": "e", "completion": ""}]


def test_lines_that_are_no_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(InputError, match="a.jsonl:3: not JSON"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="b.jsonl:1: a list"):
        list(read_jsonl(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="c.jsonl:1: not UTF-8"):
        list(read_jsonl(tmp_path / "c.jsonl"))
    with pytest.raises(InputError, match="gone.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "gone.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty.jsonl: no records"):
        read_records([tmp_path / "empty.jsonl"], sft_conversations)


def test_an_empty_file_among_others_is_warned_of(tmp_path, capsys):
    (tmp_path / "empty.json").write_text("[]")
    files = [write_lines(tmp_path / "full.jsonl", ROWS), tmp_path / "empty.json"]
    assert len(read_records(files, sft_conversations)) == len(ROWS)
    assert capsys.readouterr().err == f"warning: {files[1]}: no records\n"


def test_a_byte_order_mark_is_accepted(tmp_path):
    for name, text in (("bom.jsonl", '{"a": 1}\n'), ("bom.json", '[{"a": 1}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert list(read_objects(tmp_path / name)) == [(1, {"a": 1})]


def write(path, rows):
    """ROWS as JSON Lines, a JSON array or Parquet, gzipped or not, by the file's name."""
    text = json.dumps(rows, indent=1) if ".json." in f"{path}." else "".join(json.dumps(r) + "\n" for r in rows)
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.parquet"])
def test_every_kind_of_file_trains(name, tmp_path):
    examples = read_records([write(tmp_path / name, ROWS)], sft_conversations)
    assert [[m["content"] for m in messages] for _, messages in examples] == [list(row.values()) for row in ROWS]
    lines = [1, 2, 3] if ".json." not in f"{name}." else [2, 6, 10]
    assert [where for where, _ in examples] == [f"{tmp_path}/{name}:{n}" for n in lines]


def test_parquet_without_pyarrow_and_parquet_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_text("PAR1 no")
    with pytest.raises(InputError, match="d.parquet: (not a readable Parquet file|reading Parquet needs pyarrow)"):
        list(read_objects(tmp_path / "d.parquet"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="d.parquet: reading Parquet needs pyarrow"):
        list(read_objects(tmp_path / "d.parquet"))


def test_parquet_times_that_python_cannot_hold(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for kind in (pyarrow.timestamp("ms"), pyarrow.timestamp("us", tz="Mars/Base")):
        table = pyarrow.table({"prompt": ["a"], "time": pyarrow.array([2**59], kind)})
        parquet.write_table(table, tmp_path / "d.parquet")
        with pytest.raises(InputError, match="d.parquet: not a readable Parquet file: [A-Z]"):
            list(read_objects(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("d.jsonl.xz", lzma.compress(b"{}\n"), "xz, which is not supported; decompress"),
        ("d.jsonl.bz2", bz2.compress(b"{}\n"), "bzip2, which is not supported; decompress"),
        ("d.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x58\x11", "zstd, which is not supported; decompress"),
        ("d.jsonl", gzip.compress(b"{}\n", mtime=0), "gzip; give it a name that ends in .gz"),
        ("D.PARQUET", b"PAR1 and more", "a Parquet file; give it a name that ends in .parquet"),
        (
            "d.parquet.gz",
            gzip.compress(b"PAR1 and more", mtime=0),
            "a Parquet file; give it a name that ends in .parquet",
        ),
        ("d.csv", b"prompt,completion\na,b\n", "a table such as CSV, .* convert it to JSON Lines"),
        ("D.TSV", b"prompt\tcompletion\na\tb\n", "a table such as CSV"),
        ("d.parquet", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ],
)
def test_files_that_are_no_text_are_named(name, content, words, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"/{name}: is .*{words}"):
        list(read_objects(tmp_path / name))


def test_names_globs_and_the_hub(tmp_path, monkeypatch):
    a, b = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS)
    assert expand([tmp_path / "*.jsonl", b]) == [str(a), str(b), str(b)]
    for bad, words in [
        ("gone*", "no such file"),
        (tmp_path, "a folder"),
        ("hf://datasets/x", "not hf://datasets/OWNER"),
    ]:
        with pytest.raises(InputError, match=words):
            expand([bad])
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda filename, repo_id, revision, repo_type: str(tmp_path / filename)
    )
    assert expand(["hf://datasets/me/set@v1/a.jsonl"]) == [str(a)]

    def refuse(**_):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(InputError, match="me/set/a.jsonl: cannot be fetched: OSError: no network"):
        expand(["hf://datasets/me/set/a.jsonl"])


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz"])
def test_a_record_has_a_largest_size(name, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD", 2**20)
    monkeypatch.setattr(records, "CHUNK", 2**10)
    path = write(tmp_path / name, [{"a": "x" * 2**19}, {"a": "x" * 2**21}])
    read = read_objects(path)
    assert next(read)[1] == {"a": "x" * 2**19}
    with pytest.raises(InputError, match=f"{name}:[25]: .* more than 1 Mi"):
        next(read)


HOSTILE = [
    ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ('{"a": ' + "1" * 5000 + "}", "a number of too many digits"),
    ('{"a": 1', "not JSON|ends inside"),
    ('{"a": 1}}', "not JSON"),
    ("{'a': 1}", "not JSON"),
    ("nul", "not JSON"),
]


@pytest.mark.parametrize("text, words", HOSTILE, ids=range(len(HOSTILE)))
def test_odd_objects_end_in_one_line(text, words, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n' + text + "\n")
    (tmp_path / "d.json").write_text('[{"a": 1},\n' + text + "\n]")
    for name in ("d.jsonl", "d.json"):
        with pytest.raises(InputError, match=f"{name}:[23]: .*({words})") as e:
            list(read_objects(tmp_path / name))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[", "ends inside"),
        ("[{}", "ends inside"),
        ("[{},]", "where an object"),
        ("[{} {}]", "'{' where ',' is expected"),
        ("[1]", "'1' where an object"),
        ("[{}] x", "'x' after the end"),
        ('[{"a": "\xff"}]', "not UTF-8"),
    ],
)
def test_broken_arrays(text, words, tmp_path):
    (tmp_path / "d.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=f"d.json:1: .*{words}"):
        list(read_objects(tmp_path / "d.json"))


def test_an_array_streams_across_chunks(tmp_path, monkeypatch):
    rows = [{"a": "é\n" * n, "b": [n, {"c": None}]} for n in range(50)]
    monkeypatch.setattr(records, "CHUNK", 7)
    path = tmp_path / "d.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n\n", encoding="utf-8")
    assert [r for _, r in read_objects(path)] == rows
    (tmp_path / "none.json").write_text(" [ ] ")
    assert list(read_objects(tmp_path / "none.json")) == []


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket.jsonl"))
    for path, words in [
        (tmp_path / "pipe.jsonl", "is a pipe"),
        (tmp_path / "socket.jsonl", "is a device or a socket"),
        ("/dev/zero", "is a device or a socket"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(InputError, match=words):
            list(read_objects(path))
    server.close()
    (tmp_path / "not.jsonl.gz").write_text("{}")
    with pytest.raises(InputError, match="not.jsonl.gz: cannot be read: Not a gzipped file"):
        list(read_objects(tmp_path / "not.jsonl.gz"))


def test_keys_that_were_not_read_are_said(tmp_path, capsys):
    path = write_lines(tmp_path / "d.jsonl", [row | {"id": 1, "source": None} for row in ROWS])
    read_records([path], sft_conversations)
    assert capsys.readouterr().out == f"note: {path}: keys not read, and in how many records: id (3)\n"
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps(ROWS[0] | {"a\nb \ud800": 1}) + "\n")
    read_records([odd], sft_conversations)
    assert capsys.readouterr().out == f"note: {odd}: keys not read, and in how many records: a\\nb \\ud800 (1)\n"
    made = {key: None for key in ORIGIN_KEYS} | {"id": "a:1", "scores": {}, "recorded": "f:1"}
    read_records([write_lines(tmp_path / "e.jsonl", [*ROWS, ROWS[0] | made])], sft_conversations)
    assert capsys.readouterr().out == ""
