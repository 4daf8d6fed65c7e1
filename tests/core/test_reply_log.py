"""core/reply_log.py: what is kept, what a kill may cut, two writers, a full disk, refusals that leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc

import pytest
from conftest import ROOT

from core.files import InputError
from core.reply_log import ReplyLog

FIELDS = {"text": str}
A, B, C = (f"{i:064x}" for i in range(3))


def test_records_are_kept_in_order_and_read_again(tmp_path):
    path = tmp_path / "made" / "here" / "r.jsonl"
    with ReplyLog(path, FIELDS) as log:
        assert len(log) == 0 and A not in log and log.get(A) is None
        log.append(A, {"text": "zwei \u00e4 \u4e8c\n", "more": [1]})
        log.append(B, {"text": "", "usage": [3, 4]})
        assert log[A] == {"key": A, "text": "zwei \u00e4 \u4e8c\n", "more": [1]} and log.spent == [3, 4]
        assert len(path.read_bytes().splitlines()) == 2, "on disk before append returns"
    with ReplyLog(path, FIELDS) as log:
        assert list(log) == [A, B] and log[B]["text"] == "" and log.spent == [3, 4]
        log.append(A, {"text": "new", "usage": [1, 1]})
        assert log[A]["text"] == "new" and log[B]["text"] == "" and log.spent == [4, 5]
    with ReplyLog(path, FIELDS, read_only=True) as log:
        assert log[A]["text"] == "new" and len(log) == 2, "the last record of a key counts"


def test_a_line_cut_at_any_byte_is_dropped(tmp_path):
    path = tmp_path / "r.jsonl"
    with ReplyLog(path, FIELDS) as log:
        log.append(A, {"text": "one"})
        start = os.path.getsize(path)
        log.append(B, {"text": "zwei \u00e4"})
    whole = path.read_bytes()
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        with ReplyLog(path, FIELDS, read_only=True) as log:
            assert list(log) == [A] and path.read_bytes() == whole[:end]
        with ReplyLog(path, FIELDS) as log:
            assert list(log) == [A]
            log.append(B, {"text": "zwei \u00e4"})
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [
    b"", b"{", b"[]", b"null", b"7", b'{"key": 1, "text": ""}', b'{"key": "xyz", "text": ""}', b'{"key": "00"}', b'{"text": ""}',
    b'{"key": "00", "text": null}', b'{"key": "00", "text": "", "usage": [1]}', b'{"key": "00", "text": "", "usage": ["a", 1]}',
    b'{"key": "00", "text": "", "usage": 7}', b"\xff\xfe", b'{"key": "00", "text": ' + b"[" * 100_000,
])  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    with ReplyLog(path, FIELDS) as log:
        log.append(A, {"text": "one"})
    damaged = path.read_bytes() + line + b"\n" + path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="r.jsonl:2: not a reply; delete this line") as e:
        ReplyLog(path, FIELDS)
    assert "\n" not in str(e.value) and path.read_bytes() == damaged, "nothing of it is removed"


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "r.jsonl"
    with ReplyLog(path, FIELDS) as log:
        for _ in range(2):
            with pytest.raises(InputError, match="another run is using this folder"):
                ReplyLog(path, FIELDS)
        log.append(A, {"text": "one"})
        with pytest.raises(InputError, match="another run"):
            ReplyLog(path, FIELDS)
        with ReplyLog(path, FIELDS, read_only=True) as reader:
            assert list(reader) == [A], "reading takes no lock"
    with ReplyLog(path, FIELDS) as log:
        assert list(log) == [A]


def test_a_killed_writer_leaves_no_lock(tmp_path):
    path = tmp_path / "r.jsonl"
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from core.reply_log import ReplyLog
log = ReplyLog({str(path)!r}, {{"text": str}})
log.append({A!r}, {{"text": "one"}})
print("ready", flush=True)
time.sleep(9999)
"""
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match="another run"):
            ReplyLog(path, FIELDS)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    with ReplyLog(path, FIELDS) as log:
        assert log[A]["text"] == "one"


def test_nothing_is_left_of_a_run_without_a_reply(tmp_path):
    (tmp_path / "old").mkdir()
    for folder in ("old", "new/er"):
        with ReplyLog(tmp_path / folder / "r.jsonl", FIELDS):
            pass
    assert sorted(os.listdir(tmp_path)) == ["old"] and os.listdir(tmp_path / "old") == []
    with pytest.raises(KeyError), ReplyLog(tmp_path / "new/er/r.jsonl", FIELDS) as log:
        (tmp_path / "new/note").write_text("somebody's")
        log[A]
    assert os.listdir(tmp_path / "new") == ["note"], "a folder with another file in it stays"
    with ReplyLog(tmp_path / "missing/r.jsonl", FIELDS, read_only=True) as log:
        assert len(log) == 0 and A not in log
    assert not (tmp_path / "missing").exists()


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("file/r.jsonl", "folder.jsonl", "pipe.jsonl"):
        with pytest.raises(InputError) as e:
            ReplyLog(tmp_path / name, FIELDS)
        assert name in str(e.value) and "\n" not in str(e.value)


def test_a_full_disk_keeps_whole_lines(tmp_path):
    path = tmp_path / "r.jsonl"
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from core.files import InputError
from core.reply_log import ReplyLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with ReplyLog({str(path)!r}, {{"text": str}}) as log:
    log.append({A!r}, {{"text": "x" * 600}})
    try:
        log.append({B!r}, {{"text": "x" * 600}})
    except InputError as e:
        print(e)
    log.append({C!r}, {{"text": "x"}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1000)
    assert "cannot be written" in done.stdout and not done.stderr
    with ReplyLog(path, FIELDS) as log:
        assert list(log) == [A, C]


def test_a_large_log_stays_on_disk(tmp_path):
    """100 MB of replies are opened and read within 10 MB of memory."""
    path = tmp_path / "r.jsonl"
    with open(path, "w") as f:
        for i in range(100):
            f.write(json.dumps({"key": f"{i:064x}", "text": "x" * 1_000_000}) + "\n")
    tracemalloc.start()
    try:
        with ReplyLog(path, FIELDS) as log:
            assert len(log) == 100 and len(log[f"{99:064x}"]["text"]) == 1_000_000
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit(143)], ids=["ctrl-c", "sigterm"])
def test_a_stopped_run_says_what_is_kept(tmp_path, capsys, end):
    def stopped(*keys):
        with pytest.raises(BaseException) as e, ReplyLog(tmp_path / "r.jsonl", FIELDS) as log:
            for key in keys:
                log.append(key, {"text": "x"})
            raise end
        return e.value, capsys.readouterr().err

    value, said = stopped()
    assert isinstance(value, (KeyboardInterrupt, SystemExit)) and said == "" and not os.listdir(tmp_path)
    kept = f"{tmp_path}/r.jsonl; the same command continues"
    assert stopped(A, B)[1] == f"stopped: 2 replies are kept in {kept}\n"
    with pytest.raises(InputError), ReplyLog(tmp_path / "r.jsonl", FIELDS):
        raise InputError("bad")
    assert capsys.readouterr().err == ""
