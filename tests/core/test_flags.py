import argparse
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from core import flags
from core.files import InputError
from training.flags import add_training_flags


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (flags.at_least(2), ["2", "17"], ["1", "-3", "2.5", "two"]),
        (flags.at_least(0, high=16), ["0", "16"], ["-1", "17"]),
        (flags.number(0, below=1), ["0", "0.5", "1e-9"], ["1", "-0.1", "nan", "inf", "x"]),
        (flags.number(above=0, high=1), ["1e-9", "1"], ["0", "1.5"]),
        (flags.number(above=0), ["1e-9", "3"], ["0", "-1", "inf"]),
        (flags.out_path, ["a", "/", "./-a"], ["", "-a"]),
        (flags.torch_device, ["cpu"], ["gpu", "cuda:99", "cpu:x", "mps", "meta"]),
    ],
)
def test_values_are_checked(kind, good, bad):
    for text in good:
        assert kind(text) == type(kind(text))(text)
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_a_wrong_flag_is_one_line():
    p = flags.Parser()
    p.add_argument("--n", type=flags.at_least(1))
    p.add_argument("--kind", choices=["a", "b"])
    p.add_argument("--ref")
    for words, arguments in (
        ("--n: 0 is less than 1", ["--n", "0"]),
        ("invalid integer value: 'x'", ["--n", "x"]),
        ("--kind: invalid choice", ["--kind", "c"]),
        ("--ref: the value is empty", ["--ref", ""]),
        ("--ref: -- is no value", ["--ref=--"]),
        ("--n: -- is no value", ["--n=--"]),
        ("unrecognized arguments: --m", ["--m"]),
    ):
        with pytest.raises(InputError, match=words) as e:
            p.parse_args(arguments)
        assert "\n" not in str(e.value)


def test_help_names_the_command_as_it_is_typed(tmp_path):
    for command in (["-m", "demo.world"], ["-m", "variants.dft"], ["make_data.py"], ["merge.py"]):
        done = subprocess.run(
            [sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=1000
        )
        words = command if command[0].endswith(".py") else ["python", *command]
        assert done.stdout.startswith(f"usage: {' '.join(words)} "), done.stdout[:200] + done.stderr


def test_help_groups_the_flags():
    p = flags.Parser()
    add_training_flags(p, "base", "data.jsonl", None, epochs=1, batch_size=8, lr=1e-3)
    groups = p.format_help().split("\n\n")
    for title, flag in (("options", "--help"), ("checkpoints", "--out"), ("data", "--max-len"), ("machine", "--dtype")):
        assert [flag in group for group in groups if group.startswith(f"{title}:\n")] == [True], title


def test_help_shows_the_first_paragraph_of_a_docstring():
    p = flags.Parser(description="Draws\na line.\n\n    python draw.py\n")
    assert "Draws a line." in p.format_help() and "draw.py" not in p.format_help()
    p.description = "Draws two.\n\nNot a circle."
    assert "Draws two." in p.format_help() and "circle" not in p.format_help()
    assert flags.Parser().format_help().startswith("usage: ")


def test_only_a_file_of_ours_is_replaced(tmp_path):
    path, out = tmp_path / "o.jsonl", flags.file_out('"ours"')
    for text in (None, "", '{"ours": 1}'):
        if text is not None:
            path.write_text(text)
        assert out(str(path)) == out(f"{path}/") == str(path)
    path.write_text('{"theirs": 1}')
    with pytest.raises(InputError, match="not written by this command"):
        out(str(path))
    with pytest.raises(argparse.ArgumentTypeError):
        out("-o")


def test_an_out_with_dots_leads_somewhere(tmp_path, monkeypatch):
    """missing/../out is no place until the folder `missing` is made, and OUT.run is beside OUT."""
    monkeypatch.chdir(tmp_path)
    assert flags.checkpoint_out("missing/../out") == str(tmp_path / "out")
    assert flags.out_path("../out/") == str(tmp_path.parent / "out")
    assert flags.out_path("a..b/out..") == "a..b/out.."


def test_an_out_that_cannot_be_written_is_known_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("x")
    for out in ("file", "file/x", "full", "full/"):
        with pytest.raises(InputError, match="give another --out|as --out"):
            flags.checkpoint_out(str(tmp_path / out))
    with pytest.raises(InputError, match="is a folder"):
        (tmp_path / "d.pt").mkdir()
        flags.checkpoint_out(str(tmp_path / "d.pt"))
    monkeypatch.setenv("RANK", "1")  # it writes nothing, and may stand on a machine without that folder
    assert flags.checkpoint_out(str(tmp_path / "file" / "x")) == str(tmp_path / "file" / "x")
    monkeypatch.delenv("RANK")
    assert flags.checkpoint_out(str(tmp_path / "new" / "deep") + "//") == str(tmp_path / "new" / "deep")
    assert not os.path.exists(tmp_path / "new")
