"""docs/hacking.md: every block runs, every diff applies, and each change has the effect that the page states."""

import ast
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_lines
from training_runs import chats, feedback, launch, log, update_error, weights

from core.tokenizer import Tokenizer
from model import Qwen2
from train_sft import sft_loss
from training.examples import count_supervised
from training.logps import example_logps, supervised_logps

PAGE = (ROOT / "docs" / "hacking.md").read_text(encoding="utf-8")
SECTIONS = {text.split("\n", 1)[0]: text for text in re.split("^## ", PAGE, flags=re.M)}
BLOCKS = {title: re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S) for title, text in SECTIONS.items()}
BLOCKS = {title: blocks for title, blocks in BLOCKS.items() if blocks}


@pytest.fixture
def block(tmp_path, monkeypatch):
    """block(title, name): writes the Python block, or the file that the diff changes, as a module of that name."""
    folder, names = tmp_path / "scripts", []
    folder.mkdir()
    files = {path: (ROOT / path).read_text(encoding="utf-8") for path in ("train_sft.py", "train_kto.py")}
    python = [text for ((language, text),) in BLOCKS.values() if language == "python"]
    files |= {re.match(r"# (\w+\.py): ", text)[1]: text for text in python}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))

    def write(title, name):
        ((language, text),) = BLOCKS[title]
        if language == "diff":
            environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
            command = ["git", "apply", "-p1", "-"]
            done = subprocess.run(command, cwd=folder, input=text, text=True, capture_output=True, env=environment)
            assert done.returncode == 0, f"the diff of {title!r} does not apply: {done.stderr}"
        changed = re.match(r"(?:# |--- a/)(\w+\.py)\b", text)[1]
        (folder / f"{name}.py").write_text((folder / changed).read_text(encoding="utf-8"), encoding="utf-8")
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "data.jsonl", chats(13))


def flags(ckpt, data, out, *more):
    common = ("--batch-size", 4, "--lr", 1e-2, "--warmup", 0, "--max-len", 64, "--micro-tokens", 60)
    return [str(word) for word in ("--ckpt", ckpt, "--data", data, "--out", out, *common, *more)]


def encoded(ckpt):
    tokenizer = Tokenizer(ckpt)
    return [tokenizer.chat_ids(record["messages"]) for record in chats(13)]


def logits(model, ids):
    """The distributions of ids[1:], one example at a time: (len(ids) - 1, V)."""
    return model(torch.tensor([ids]))[0, :-1].float().log_softmax(-1)


def naive_logps(model, examples):
    """The log-probability of every supervised token: (N,)."""
    rows = [logits(model, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for ids, _ in examples]
    return torch.cat([row[torch.tensor(supervised[1:])] for row, (_, supervised) in zip(rows, examples)])


def gradient_norm(model, loss):
    return torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()


def test_every_block_has_its_test():
    blocks = {title: [language for language, _ in found] for title, found in BLOCKS.items()}
    assert blocks == {
        "The loop": ["python"],
        "1. A weighted loss": ["diff"],
        "2. The loss of every token": ["diff"],
        "3. LoRA": ["python"],
        "4. A KL to the reference": ["diff"],
        "5. A pairwise loss": ["diff"],
    }


def test_main_of_the_loop_has_at_most_twenty_lines():
    ((_, text),) = BLOCKS["The loop"]
    (main,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno <= 20  # without its first line, `def main():`


def test_the_loop_trains_as_train_sft_does(tiny, data, tmp_path, block, run):
    for script, out in (block("The loop", "loop"), "a"), ("train_sft", "b"):
        words = flags(tiny, data, tmp_path / out, "--epochs", 3, "--save-every", 5)
        del words[(at := words.index("--warmup")) : at + 2]  # the default: one of twelve steps
        assert run(script, *words)[0] == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert update_error(a, b, weights(tiny)) == 0  # and they moved
    for ours, theirs in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        assert ours == {key: theirs[key] for key in ours}


def test_a_weighted_loss(tiny, data, tmp_path, block, run):
    more = ("--max-steps", 1, "--batch-size", 13, "--eval-data", data)
    assert run(block("1. A weighted loss", "dft"), *flags(tiny, data, tmp_path / "o", *more))[0] == 0
    (step,) = log(tmp_path / "o")
    model = Qwen2.from_pretrained(tiny)
    logps = naive_logps(model, encoded(tiny))
    loss = -(logps.exp().detach() * logps).mean()
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-4) and loss < -0.5 * logps.mean()
    assert step["grad_norm"] == pytest.approx(gradient_norm(model, loss), rel=1e-3)
    after, _ = supervised_logps(Qwen2.from_pretrained(tmp_path / "o"), encoded(tiny))
    assert step["eval_loss"] == pytest.approx(sft_loss(after, len(after)).item(), rel=1e-4)  # plain cross-entropy


def test_the_loss_of_every_token(tiny, data, tmp_path, block, run):
    more = ("--max-steps", 1, "--batch-size", 13)
    code, text, _ = run(block("2. The loss of every token", "tokens"), *flags(tiny, data, tmp_path / "o", *more))
    printed = re.findall(r"^step 1 '(.*)' (-?\d+\.\d{4})$", text, re.M)
    (step,), examples, tokenizer = log(tmp_path / "o"), encoded(tiny), Tokenizer(tiny)
    assert code == 0 and len(printed) == count_supervised(examples)
    tokens = [token for ids, supervised in examples for token, learn in zip(ids, supervised) if learn]
    losses = (-naive_logps(Qwen2.from_pretrained(tiny), examples)).tolist()
    expected = sorted((tokenizer.backend.id_to_token(token), loss) for token, loss in zip(tokens, losses))
    for (token, loss), (want_token, want) in zip(sorted((t, float(x)) for t, x in printed), expected, strict=True):
        assert token == want_token and loss == pytest.approx(want, abs=1e-3)
    assert step["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert {"<|im_end|>", "Ċ"} <= {token for token, _ in printed}


def test_lora_on_one_rank_and_on_two(tiny, data, tmp_path, block):
    name = block("3. LoRA", "lora")
    for out, ranks in ("one", 1), ("two", 2):
        arguments = flags(tiny, data, tmp_path / out, "--epochs", 2, "--eval-data", data)
        codes, texts = launch(name, arguments, tmp_path / "text", ranks)
        assert codes == [0] * ranks and "OUT will hold" not in texts[0], texts
    base, one, two = weights(tiny), weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() == base.keys() and update_error(one, two, base) < 0.01
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], one[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    delta = one["model.layers.0.mlp.up_proj.weight"] - base["model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) <= 8
    steps, examples = log(tmp_path / "one"), encoded(tiny)
    folded = example_logps(Qwen2.from_pretrained(tmp_path / "one"), examples).sum() / -count_supervised(examples)
    assert steps[-1]["eval_loss"] == pytest.approx(folded.item(), rel=1e-4) and folded < steps[0]["loss"]


def test_a_kl_to_the_reference(tiny, data, tmp_path, block, run):
    """13 examples in steps of 4: in the last step one rank of two has no work."""
    name, more = block("4. A KL to the reference", "with_kl"), ("--epochs", 1, "--no-shuffle", "--save-every", 1)
    assert run(name, *flags(tiny, data, tmp_path / "o", *more, "--keep", 9))[0] == 0
    ref, steps, examples = Qwen2.from_pretrained(tiny), log(tmp_path / "o"), encoded(tiny)
    for step, source in enumerate([tiny, tmp_path / "o.run" / "step-1", tmp_path / "o.run" / "step-2"]):
        model, batch, kl = Qwen2.from_pretrained(source), examples[4 * step : 4 * step + 4], []
        for ids, supervised in batch:
            p, q = logits(model, ids), logits(ref, ids)
            kl.append((p.exp() * (p - q)).sum(-1)[torch.tensor(supervised[1:])])
        kl = torch.cat(kl).mean().item()
        assert kl > 0.1 if step else kl == 0
        expected = sft_loss(naive_logps(model, batch), count_supervised(batch)).item() + 0.1 * kl
        assert steps[step]["loss"] == pytest.approx(expected, rel=1e-4)
    arguments = flags(tiny, data, tmp_path / "two", *more, "--shard")
    codes, texts = launch(name, arguments, tmp_path / "text", 2)
    assert codes == [0, 0], texts
    assert update_error(weights(tmp_path / "o"), weights(tmp_path / "two"), weights(tiny)) < 0.01


def test_a_pairwise_loss(tiny, tmp_path, block, run, refused):
    name = block("5. A pairwise loss", "dpo")
    replies = [record["completion"][0]["content"] for record in feedback(14)]
    records = [{"prompt": f"question {i}", "chosen": replies[2 * i], "rejected": replies[2 * i + 1]} for i in range(7)]
    pairs = write_lines(tmp_path / "pairs.jsonl", records)
    more = ("--epochs", 2, "--no-shuffle", "--save-every", 1, "--keep", 9, "--lr", 1e-3)
    assert run(name, *flags(tiny, pairs, tmp_path / "o", *more))[0] == 0
    losses = [step["loss"] for step in log(tmp_path / "o")]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5) and losses[2] < losses[0] and losses[3] < losses[1]
    arguments = flags(tiny, pairs, tmp_path / "two", *more, "--micro-tokens", 1)
    codes, texts = launch(name, arguments, tmp_path / "text", 2)
    assert codes == [0, 0], texts
    assert update_error(weights(tmp_path / "o"), weights(tmp_path / "two"), weights(tiny)) < 0.01
    labelled = write_lines(tmp_path / "labelled.jsonl", feedback(2))
    refused("not one chosen and one rejected reply", name, *flags(tiny, labelled, tmp_path / "p"))


def test_the_second_pairwise_loss_is_the_formula(tiny, tmp_path, block, run):
    """One pair, so that the order of the steps is known."""
    record = {"prompt": "What is the capital of France?", "chosen": "Paris is.", "rejected": "The lazy dog."}
    pair = write_lines(tmp_path / "pair.jsonl", [record])
    more = ("--epochs", 2, "--save-every", 1, "--lr", 1e-3)
    assert run(block("5. A pairwise loss", "one_pair"), *flags(tiny, pair, tmp_path / "o", *more))[0] == 0
    tokenizer, rewards = Tokenizer(tiny), []
    for reply in record["chosen"], record["rejected"]:
        example = tokenizer.chat_ids(
            [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": reply}]
        )
        policy, ref = (
            naive_logps(Qwen2.from_pretrained(c), [example]).sum() for c in (tmp_path / "o.run" / "step-1", tiny)
        )
        rewards.append(0.1 * (policy - ref))
    expected = -F.logsigmoid(rewards[0] - rewards[1]).item()
    assert log(tmp_path / "o")[1]["loss"] == pytest.approx(expected, rel=1e-4) and expected < 0.69
