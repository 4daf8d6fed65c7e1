"""README.md and docs/*.md: the Python lines run, the command lines parse, the links lead somewhere."""

import argparse
import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.distributed.run import get_args_parser

import train_kto
from core.conversations import kto_examples, sft_conversations
from core.files import InputError
from core.records import read_records

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(path):
    """The command lines of a page's bash blocks as lists of words; of the README those within sentences too."""
    text = path.read_text(encoding="utf-8")
    lines = [line for block in fenced(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    if path.name == "README.md":
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if re.match(r"(python|torchrun|bash) ", code)]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


COMMANDS = [(path, words) for path in PAGES for words in commands(path)]

# ---------------------------------------------------------------------------------------------------------------------
# Python


def test_the_quoted_loss_is_the_source():
    """The function of train_kto.py without its docstring and annotations, statement by statement."""
    (block,) = fenced(README, "python")
    (quoted,) = ast.parse(block).body
    (source,) = ast.parse(inspect.getsource(train_kto.kto_loss)).body
    source.body, source.returns = source.body[1:], None
    for arg in source.args.args:
        arg.annotation = None
    assert ast.unparse(quoted) == ast.unparse(source)


def test_the_quoted_loss_runs():
    names = {"torch": torch}
    exec(fenced(README, "python")[0], names)
    policy, ref, desirable = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.5]), torch.tensor([True, False])
    losses, rewards = names["kto_loss"](policy, ref, torch.tensor(0.2), desirable, 0.5, 1.0, 2.0)
    sigmoid = lambda x: 1 / (1 + torch.tensor(-x).exp().item())
    assert losses.tolist() == pytest.approx([1 - sigmoid(0.5 * 0.8), 2 * (1 - sigmoid(0.5 * 0.7))])
    assert rewards.tolist() == pytest.approx([0.5, -0.25])


# ---------------------------------------------------------------------------------------------------------------------
# Commands


class Parsed(Exception):
    """The parser accepted the command."""


def parse(words, monkeypatch):
    """Runs the parser of a command line, and nothing after it. Parsed if it accepts the flags."""
    if words[0] == "torchrun":
        args = get_args_parser().parse_args(words[1:])
        script, rest = args.training_script, args.training_script_args
    else:
        script, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        assert words[0] == "python" and (words[1] == "-m" or script.endswith(".py")), words
    module = script.removesuffix(".py")
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{script} does not exist"
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, *given):
        real(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [script, *rest])
    importlib.import_module(module).main()


@pytest.mark.parametrize("path, words", COMMANDS, ids=lambda x: " ".join(x)[:80] if isinstance(x, list) else x.name)
def test_commands_parse(path, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if words[0] == "bash":
        subprocess.run(["bash", "-n", ROOT / words[1]], check=True)
        return
    with pytest.raises(Parsed):
        parse(words, monkeypatch)
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_does_not_parse(monkeypatch):
    with pytest.raises(InputError, match="--learning-rate"):
        parse(["torchrun", "train_kto.py", "--learning-rate", "1"], monkeypatch)


def test_the_five_lines_of_the_mission_are_there():
    """From data to evaluation, in this order, each with the defaults of the line before it."""
    scripts = [word for path, words in COMMANDS if path.name == "README.md" for word in words if word.endswith(".py")]
    assert scripts[:5] == ["make_data.py", "train_sft.py", "train_kto.py", "merge.py", "eval.py"]
    assert ["torchrun", "train_kto.py", "--ckpt", "sft.pt"] in [words for _, words in COMMANDS]


# ---------------------------------------------------------------------------------------------------------------------
# Records and links


def test_the_example_records_can_be_read(tmp_path):
    blocks = fenced((ROOT / "docs" / "data-formats.md").read_text(encoding="utf-8"), "jsonl")
    for block, read, n in zip(blocks, (sft_conversations, kto_examples), (4, 4), strict=True):
        path = tmp_path / "data.jsonl"
        path.write_text(block)
        assert len(read_records([str(path)], read)) == n  # a preference is two KTO examples


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_the_log_is_newest_first():
    dates = re.findall(r"^## (\d{4}-\d{2}-\d{2}): ", (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8"), re.M)
    assert len(dates) > 20 and dates == sorted(dates, reverse=True)
