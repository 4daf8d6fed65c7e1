import json
import os
import signal
import stat
import subprocess
import sys

import pytest
from conftest import ROOT

from core.card import readme_license
from core.files import InputError, atomic_write, cli, json_object, print_next, printable, read_json, temporary_path
from core.flags import check_out
from core.interrupt import exit_silently
from core.outputs import (
    MANIFEST,
    check_checkpoint_path,
    check_file,
    check_folder,
    check_inputs,
    check_writable,
    claim_folder,
    claimed_folder,
    is_inside,
    read_manifest,
    remove_leftovers,
    swap_folders,
    written_files,
)
from curation.step_files import load_state


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def names(folder):
    return sorted(os.listdir(folder))


def test_a_written_file_has_the_mode_of_the_umask_or_of_the_file_before(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as f:
            f.write("é")
        assert mode(tmp_path / "a") == 0o640 and (tmp_path / "a").read_bytes() == b"\xc3\xa9"
        os.chmod(tmp_path / "a", 0o600)
        with atomic_write(tmp_path / "a") as f:
            f.write("b")
        assert mode(tmp_path / "a") == 0o600 and (tmp_path / "a").read_text() == "b"
    finally:
        os.umask(before)


def test_half_a_surrogate_pair_is_written_as_an_escape(tmp_path):
    """File names that are not UTF-8, and JSON's lone \\ud83d, come up in reports and logs."""
    with atomic_write(tmp_path / "a") as f:
        json.dump({"\ud83d": os.fsdecode(b"\xff"), "é": 1}, f, ensure_ascii=False)
    assert read_json(tmp_path / "a") == {"\ud83d": "\udcff", "é": 1}
    assert "é" in (tmp_path / "a").read_text()


def test_a_name_without_room_for_the_temporary_name_is_refused(tmp_path):
    check_writable(str(tmp_path / ("a" * 230)))
    with atomic_write(tmp_path / ("a" * 230)) as f:
        f.write("x")
    with pytest.raises(InputError, match="File name too long"):
        check_writable(str(tmp_path / ("a" * 240)))
    with pytest.raises(InputError, match="File name too long"):
        check_writable(str(tmp_path / "new" / ("a" * 240)))
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x" * 300 + "/y", "File name too long"),  # a missing folder
        ("new/" + "x" * 300 + "/y", "File name too long"),
        ("/".join(["d" * 200] * 25), "File name too long"),  # the whole path
        ("/".join(["d" * 49] * 79), "File name too long"),  # the files inside it
        ("/".join("d" * 1500), "new folders"),
        ("file/y/z", "Not a directory"),
        ("loop/y", "Too many levels of symbolic links"),
    ],
    ids=lambda text: text[:12],
)
def test_a_path_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch, out, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    os.symlink("loop", "loop")
    checks = (check_writable, check_out, lambda path: check_file(path, "x"), lambda path: check_folder(path, "x", []))
    for check in checks:
        for path in (out, f"{out}.pt"):
            with pytest.raises(InputError, match=words):
                check(path)
    assert names(tmp_path) == ["file", "loop"]


def test_a_long_path_that_can_be_made_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = "/".join(["d" * 73] * ((3850 - len(str(tmp_path))) // 74))
    check_writable(out)
    with atomic_write(out) as f:
        f.write("x")
    check_writable(out)


def test_a_removed_current_folder(tmp_path):
    command = f"cd {tmp_path} && mkdir gone && cd gone && rmdir ../gone && {sys.executable} {ROOT}/train_sft.py --out x"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the current folder: No such file or directory; change to another folder\n"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, InputError)), atomic_write(tmp_path / "a") as f:
            f.write("new")
            raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_text("old")
    os.symlink("target", tmp_path / "link")
    with atomic_write(tmp_path / "link") as f:
        f.write("new")
    assert os.path.islink(tmp_path / "link") and (tmp_path / "target").read_text() == "new"


def test_only_leftovers_of_dead_writers_are_removed(tmp_path):
    dead = temporary_path(str(tmp_path / "a"))
    similar = [
        str(tmp_path / n) for n in ("a.tmp", "a.tmp123", "a.tmp0123456789abcdef", f"{os.path.basename(dead)}.old")
    ]
    for path in (dead, *similar, temporary_path(str(tmp_path / "b"))):
        with open(path, "w") as f:
            f.write("x")
    with atomic_write(tmp_path / "a") as f:
        remove_leftovers(str(tmp_path), "a")
        left = names(tmp_path)
        f.write("whole")
    assert os.path.basename(dead) not in left and {os.path.basename(p) for p in similar} < set(left)
    assert os.path.basename(f.name) in left and len(left) == len(similar) + 2, "one is being written, one is b's"
    assert (tmp_path / "a").read_text() == "whole"
    remove_leftovers(str(tmp_path))
    assert names(tmp_path) == sorted(["a", *map(os.path.basename, similar)])


def test_a_write_clears_what_a_killed_one_left(tmp_path):
    if (child := os.fork()) == 0:
        with atomic_write(tmp_path / "a") as f:
            f.write("half")
            f.flush()
            os._exit(9)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    with atomic_write(tmp_path / "a") as alive:
        with atomic_write(tmp_path / "a") as f:  # does not remove that of a live process
            f.write("first")
        alive.write("second")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "second"


def test_a_folder_is_claimed_file_by_file(tmp_path):
    out = tmp_path / "out"
    claim_folder(str(out), "eval.py", ["results.json"])
    (out / "results.json").write_text("1")
    claim_folder(str(out), "eval.py", ["results.json", "results.md"])
    (out / "report.md").write_text("mine")
    with pytest.raises(InputError, match="report.md: was not written by make_data.py"):
        check_folder(str(out), "make_data.py", ["report.md"])
    with pytest.raises(InputError, match="results.json: was not written by make_data.py"):
        claim_folder(str(out), "make_data.py", ["results.json"])
    assert names(out) == [MANIFEST, "report.md", "results.json"]
    for text in ("{", "[]", '{"files": {"../x": "eval.py"}}', '{"files": {"report.md": 1}}', "[" * 10**5):
        (out / MANIFEST).write_text(text)
        with pytest.raises(InputError, match="was not written by"):
            check_folder(str(out), "eval.py", ["report.md"])


@pytest.mark.parametrize("text", ["mine", "{}", '{"files": []}', ""])
def test_a_users_file_with_the_manifests_name_is_kept(tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text(text)
    out, words = str(tmp_path / "out"), f"{MANIFEST}: was not written by this project"
    for check in (check_checkpoint_path, check_out, lambda out: claim_folder(out, "eval.py", ["results.json"])):
        with pytest.raises(InputError, match=words):
            check(out)
    assert names(out) == [MANIFEST] and (tmp_path / "out" / MANIFEST).read_text() == text


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(InputError), claimed_folder(str(tmp_path / "new"), "x", ["a"]):
        raise InputError("refused")
    assert names(tmp_path) == []
    with claimed_folder(str(tmp_path / "new"), "x", ["a"]):
        (tmp_path / "new" / "a").write_text("1")
    assert names(tmp_path / "new") == [MANIFEST, "a"]


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="a.json: exists and was not written by this command"):
        check_file(str(tmp_path / "a.json"), '"ours"')
    (tmp_path / "a.json").write_text('{"ours": 1}')
    check_file(str(tmp_path / "a.json"), '"ours"')
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is not a regular file"):
        check_file(str(tmp_path / "pipe"), '"ours"')
    with pytest.raises(InputError, match="nothing can be written in"):
        check_file(str(tmp_path / "a.json" / "b"), "")


def test_inputs_and_out_must_be_apart(tmp_path):
    (tmp_path / "base" / "inner").mkdir(parents=True)
    os.symlink(tmp_path / "base", tmp_path / "link")
    base = str(tmp_path / "base")
    for out, words in (
        (base, "is one of"),
        (f"{tmp_path}/link/", "is one of"),
        (f"{base}/x", "is inside"),
        (str(tmp_path), "inside"),
    ):
        with pytest.raises(InputError, match=words):
            check_inputs(out, ["Qwen/Qwen2-0.5B", base])
    check_inputs(f"{base}-sft", [base])
    assert is_inside(f"{base}/inner", base) and not is_inside(f"{base}2", base)


def test_exchange(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if swap_folders(str(tmp_path / "a"), str(tmp_path / "b")):
        assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]
    assert not swap_folders(str(tmp_path / "a"), str(tmp_path / "none")) and names(tmp_path) == ["a", "b"]


def test_a_pipe_in_a_folder_blocks_nothing(tmp_path):
    for name in (MANIFEST, "README.md"):
        os.mkfifo(tmp_path / name)
    assert read_manifest(str(tmp_path)) == {"files": {}, "card": None}
    assert written_files(str(tmp_path), "checkpoint") == set() and readme_license(str(tmp_path)) is None
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(InputError, match="state.json: is a pipe"):
        load_state(str(tmp_path))


def test_pipes_and_large_and_deep_files_are_one_line(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match="is a pipe, device or socket"):
            read_json(path)
    (tmp_path / "deep").write_text("[" * 10**6)
    (tmp_path / "digits").write_text('{"a": ' + "9" * 5000 + "}")
    for name in ("deep", "digits"):
        with pytest.raises(InputError, match=f"{name}: cannot be read as JSON"):
            read_json(tmp_path / name)
    (tmp_path / "large").write_text('{"a": 1}')
    monkeypatch.setattr("core.files.MAX_TEXT", 5)
    with pytest.raises(InputError, match="large: is larger than"):
        read_json(tmp_path / "large")
    with pytest.raises(InputError, match="x: holds a JSON int"):
        json_object("3", "x")


def test_a_real_terminal_gets_control_characters_as_escapes():
    code = "from core.files import visible; print(visible('a\\x1b[2J\\tb'))"
    ours, terminal = os.openpty()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=terminal, check=True)
    assert os.read(ours, 100) == b"a\\x1b[2J\tb\r\n"
    piped = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b"a\x1b[2J\tb\n"


def test_an_error_is_one_printable_line(capsys):
    def main():
        raise InputError("a\nb\x1b[31m\u202e" + "c" * 10**6)

    with pytest.raises(SystemExit) as stopped:
        cli(main)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: a\\nb\\x1b[31m\\u202eccc") and err.count("\n") == 1
    assert len(err) < 3000 and printable("grün ±") == "grün ±"


def test_ctrl_c_is_silent_while_the_interpreter_exits():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    during = []
    try:
        signal.signal(signal.SIGINT, exit_silently)
        cli(lambda: during.append(signal.getsignal(signal.SIGINT)))
        with pytest.raises(SystemExit):
            cli(lambda: (_ for _ in ()).throw(InputError("x")))
        assert during == [signal.default_int_handler] and signal.getsignal(signal.SIGINT) is exit_silently
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SCRIPT = "import sys; sys.path.insert(0, sys.argv[1]); from core.files import cli; cli(lambda: {})"


def python(code, **more):
    command = [sys.executable, "-c", SCRIPT.format(code), str(ROOT)]
    return subprocess.Popen(command, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more))


def test_stdout_that_holds_ascii_alone():
    done = python("print('± 你')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = done.communicate(timeout=1000)
    assert (done.returncode, out, err) == (0, b"\\xb1 \\u4f60\n", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("size", [10, 10**6])
def test_an_output_on_a_full_disk_is_one_line(size):
    with open("/dev/full", "w") as full:
        done = python(f"print('x' * {size})", stdout=full)
        _, err = done.communicate(timeout=1000)
        assert (done.returncode, err) == (
            2,
            b"error: the output cannot be written: No space left on device; make room\n",
        )
        done = python(f"print('x' * {size})", stdout=full, stderr=full)
        assert done.wait(1000) == 2


@pytest.mark.parametrize("fd", [1, 2])
def test_a_closed_stream_is_no_fault(fd, tmp_path):
    """The next file that is opened does not get its number: messages of C libraries would be written into it."""
    code = f"(sys.stdout.write('x'), sys.stderr.write('y'), open({str(tmp_path / 'f')!r}, 'w').fileno() > 2 or 1 / 0)"
    done = python(code, preexec_fn=lambda: os.close(fd))
    out, err = done.communicate(timeout=1000)
    assert (done.returncode, out, err) == (0, b"" if fd == 1 else b"x", b"" if fd == 2 else b"y")


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_reader_that_ends_is_no_traceback(size):
    done = python(f"(sys.stdin.read(), print('x' * {size}))", stdin=subprocess.PIPE)
    done.stdout.close()
    done.stdin.close()  # only now it prints
    assert (done.wait(1000), done.stderr.read()) == (141, b"")


@pytest.mark.parametrize(
    "script", ["train_sft.py", "train_kto.py", "merge.py", "make_data.py", "eval.py", "generate.py"]
)
def test_ctrl_c_during_imports_is_silent(script, tmp_path):
    """A torch that never finishes loading stands in for the slow one."""
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\nwhile True: time.sleep(0.01)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    arguments = {  # all scripts parse them before they load torch
        "merge.py": ["--method", "linear", "--models", "a", "--out", "b"],
        "make_data.py": ["--sources", "a", "--teacher", "b", "--small", "c"],
        "eval.py": ["--ckpt", "a", "--tasks", "gsm8k"],
        "generate.py": ["--ckpt", "a"],
    }.get(script, ["--ckpt", "a", "--data", "b"])
    done = subprocess.Popen(
        [sys.executable, ROOT / script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.stdout.readline() == b"loading\n"
    done.send_signal(signal.SIGINT)
    assert (done.wait(1000), done.stderr.read()) == (130, b"")


def test_input_that_is_not_utf8_is_replaced():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from core.files import cli; cli(lambda: print(ascii(input())))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b"a\xffb\n", capture_output=True, timeout=1000)
    assert done.stdout == b"'a\\ufffdb'\n", done.stderr


def test_a_file_name_in_a_next_line_is_no_flag(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-base").mkdir()
    print_next("python", "-m", "variants.novelty", "--ckpt", "-base", "a b", "--tasks", "gsm8k")
    assert capsys.readouterr().out == "next: python -m variants.novelty --ckpt ./-base 'a b' --tasks gsm8k\n"


def test_an_output_beyond_the_limit_on_file_sizes_is_one_line(tmp_path):
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from core.files import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
cli(lambda: print("x" * 100))
"""
    with open(tmp_path / "out.txt", "w") as out:
        done = subprocess.run([sys.executable, "-c", script], stdout=out, stderr=subprocess.PIPE, timeout=1000)
    assert (done.returncode, done.stderr) == (2, b"error: the output cannot be written: File too large; make room\n")
