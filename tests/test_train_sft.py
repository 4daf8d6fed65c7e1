import json
import math
import os
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines
from training_runs import chats, flags, log, several_turns, update_error, weights

import train_sft
from core.checkpoint import Checkpoint
from core.distributed import Ranks, rank_micro_batches
from core.tokenizer import Tokenizer
from model import Qwen2
from train_sft import sft_loss
from training.examples import count_supervised
from training.logps import example_logps, supervised_logps
from training.run import first_and_last, print_progress
from training.setup import plan_steps, plan_warmup, shuffled_order


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "sft.jsonl", chats(13))


def test_loss_is_cross_entropy_per_supervised_token_of_the_step(tiny):
    m, tok = Qwen2.from_pretrained(tiny), Tokenizer(tiny)
    examples = [tok.chat_ids(r["messages"]) for r in chats(5)]
    n = count_supervised(examples)
    total, tokens = 0.0, 0
    for ids, supervised in examples:  # the definition, one example at a time
        logps = m(torch.tensor([ids]))[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if supervised[t]:
                total, tokens = total - logps[t - 1, ids[t]].item(), tokens + 1
    assert tokens == n
    parts = [sft_loss(supervised_logps(m, part)[0], n).item() for part in (examples[:2], examples[2:])]
    assert sum(parts) == pytest.approx(total / n, rel=1e-5)
    assert -example_logps(m, examples).sum().item() == pytest.approx(total, rel=1e-5)


def test_every_assistants_turn_of_messages_is_learnt(tiny, tmp_path, run):
    data = write_lines(tmp_path / "sft.jsonl", several_turns(4))
    assert run("train_sft", *flags(tiny, data, tmp_path / "out", "--max-steps", 1, "--max-len", 1024))[0] == 0
    m, tok = Qwen2.from_pretrained(tiny), Tokenizer(tiny)
    examples = [tok.chat_ids(r["messages"]) for r in several_turns(4)]
    replies = [tok.completion_ids(x["content"]) for r in several_turns(4) for x in r["messages"][1::2]]
    assert count_supervised(examples) == sum(map(len, replies))
    expected = -example_logps(m, examples).sum().item() / sum(map(len, replies))
    assert log(tmp_path / "out")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_model_that_a_run_starts_from_is_not_written_over(tiny, data, tmp_path, refused):
    refused("would overwrite the checkpoint of --ckpt", "train_sft", *flags(tiny, data, str(tiny) + "/"))
    refused(
        ["checkpoint of --ckpt", "x.pt.run"],
        "train_sft",
        *flags(f"{tmp_path}/x.pt.run/step-2.pt", data, tmp_path / "x.pt"),
    )


def test_examples_end_where_the_positions_do(tmp_path, run):
    tiny_model(max_position_embeddings=50).save(str(tmp_path / "short"), tiny_files())
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b c " * 60}) + "\n")
    more = ("--max-steps", 1, "--batch-size", 3)
    code, text, _ = run("train_sft", *flags(tmp_path / "short", tmp_path / "long.jsonl", tmp_path / "o", *more))
    assert code == 0 and "the model has 50 positions" in text and log(tmp_path / "o")[0]["tokens"] == 50
    assert json.loads((tmp_path / "o.run" / "args.json").read_text())["max_len"] == 50


@pytest.mark.usefixtures("kernels")
def test_any_cut_gives_the_same_step(tiny, data, tmp_path, run):
    base = weights(tiny)
    assert run("train_sft", *flags(tiny, data, tmp_path / "one"))[0] == 0
    assert run("train_sft", *flags(tiny, data, tmp_path / "cut", "--micro-tokens", 1))[0] == 0
    assert update_error(weights(tmp_path / "one"), weights(tmp_path / "cut"), base) < 0.01
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "cut"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_resume_with_other_settings_is_refused(tiny, data, tmp_path, run, refused, monkeypatch):
    monkeypatch.setattr(train_sft, "finish_run", lambda *a: None)  # a run that ends before its last save is dropped
    assert run("train_sft", *flags(tiny, data, tmp_path / "a", "--save-every", 5))[0] == 0
    refused(["differs in lr", "state.json"], "train_sft", *flags(tiny, data, tmp_path / "a", "--lr", 1e-4, "--resume"))
    other = write_lines(tmp_path / "other.jsonl", chats(13, seed=1))
    refused("differs in the data", "train_sft", *flags(tiny, other, tmp_path / "a", "--resume"))


def test_pt_in_and_out_fp32_and_the_run_files(tiny, data, tmp_path, run):
    tiny_model().save(str(tmp_path / "half.pt"), tiny_files(), dtype=torch.bfloat16)
    held_out = write_lines(tmp_path / "held.jsonl", chats(3, seed=9))
    more = ("--dtype", "bf16", "--eval-data", held_out, "--eval-every", 2)
    code, out, _ = run("train_sft", *flags(str(tmp_path / "half.pt"), data, tmp_path / "o.pt", *more))
    assert code == 0 and "wrote" in out and "13 examples, 0 dropped" in out
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "o.pt").values())
    steps = log(tmp_path / "o.pt")
    assert [s["step"] for s in steps] == list(range(1, 9))
    assert list(steps[0]) == ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second"]
    evaluated = [s["step"] for s in steps if "eval_loss" in s]
    assert evaluated == [2, 4, 6, 8] and steps[-1]["eval_loss"] < steps[1]["eval_loss"] * 1.5
    assert steps[-1]["loss"] < steps[0]["loss"]
    saved = json.loads((tmp_path / "o.pt.run" / "args.json").read_text())
    assert saved["lr"] == 1e-3 and saved["batch_size"] == 4
    assert Checkpoint(tmp_path / "o.pt").files == tiny_files()


def test_an_update_smaller_than_bf16_can_hold_is_kept(tiny, data, tmp_path, run):
    more = ("--lr", 1e-7, "--dtype", "bf16", "--max-steps", 2, "--schedule", "constant")
    assert run("train_sft", *flags(tiny, data, tmp_path / "o", *more))[0] == 0
    a, b = weights(tiny), weights(tmp_path / "o")
    moved = [(a[n] != b[n]).float().mean().item() for n in a if a[n].ndim > 1]
    assert min(moved) > 0.3


def test_order_is_drawn_from_the_seed_and_differs_by_epoch():
    steps = plan_steps(10, 4, 2, None, order=shuffled_order(10, 7))
    assert (
        steps
        == plan_steps(10, 4, 2, None, order=shuffled_order(10, 7))
        != plan_steps(10, 4, 2, None, order=shuffled_order(10, 8))
    )
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    assert plan_steps(9, 4, 1, None, smallest=2) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert plan_steps(3, 2, 1, 5) == [[0, 1], [2], [0, 1], [2], [0, 1]]


def test_shares_of_the_ranks_are_the_whole():
    lengths = [7, 100, 30, 30, 5, 64, 2]
    for world in (1, 2, 3, 8):
        shares = [rank_micro_batches(lengths, 64, Ranks(r, world)) for r in range(world)]
        assert sorted(i for share in shares for b in share for i in b) == list(range(7))
    two = [sum(lengths[i] for b in rank_micro_batches(lengths, 10**6, Ranks(r, 2)) for i in b) for r in range(2)]
    assert min(two) > 80 and math.isclose(sum(two), sum(lengths))


def test_examples_with_nothing_supervised_left_are_dropped_and_counted(tiny, tmp_path, run, refused):
    long = {
        "messages": [{"role": "user", "content": "The quick brown fox " * 30}, {"role": "assistant", "content": "x"}]
    }
    data = write_lines(tmp_path / "d.jsonl", [*chats(4), long])
    code, out, _ = run("train_sft", *flags(tiny, data, tmp_path / "o"))
    assert code == 0 and "4 examples, 1 dropped" in out
    only_long = write_lines(tmp_path / "l.jsonl", [long])
    refused(["l.jsonl: no example", "--max-len 64"], "train_sft", *flags(tiny, only_long, tmp_path / "p"))
    assert not os.path.exists(tmp_path / "p.run")


def test_bad_input(tiny, data, tmp_path, refused):
    bad = write_lines(tmp_path / "bad.jsonl", [*chats(1), {"messages": [{"role": "user"}]}])
    refused("bad.jsonl:2:", "train_sft", *flags(tiny, bad, tmp_path / "o"))
    empty = write_lines(tmp_path / "empty.jsonl", [])
    refused("empty.jsonl: no records", "train_sft", *flags(tiny, empty, tmp_path / "o"))
    refused("no such checkpoint", "train_sft", *flags("/no/where", data, tmp_path / "o"))
    shutil.copytree(tiny, tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    refused(["config.json", "llama"], "train_sft", *flags(str(tmp_path / "llama"), data, tmp_path / "o"))
    assert not [f for f in os.listdir(tmp_path) if f.startswith("o")]


def test_a_run_that_is_all_warmup_is_warned_of(tiny, data, tmp_path, run):
    assert "warning: all 8 steps are warmup" in run("train_sft", *flags(tiny, data, tmp_path / "o", "--warmup", 10))[1]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (10, 1), (99, 9), (100, 10), (5000, 10)])
def test_the_default_warmup_is_a_tenth_of_a_short_run(steps, warmup, capsys):
    args = Namespace(warmup=None, max_steps=None)
    plan_warmup(args, [[0]] * steps)
    text = capsys.readouterr().out
    assert args.warmup == warmup and ("warmup:" in text) == (steps < 100)
    assert ("smaller --batch-size and a larger --lr" in text) == (steps < 10)
    args = Namespace(warmup=7, max_steps=None)
    plan_warmup(args, [[0]] * steps)
    assert args.warmup == 7


def test_a_run_without_warmup_flag_says_it_and_resumes(tiny, data, tmp_path, run):
    out = tmp_path / "o"
    args = ("train_sft", "--ckpt", tiny, "--data", data, "--out", out, "--batch-size", 4, "--lr", 1e-3, "--max-len", 64)
    code, text, _ = run(*args, "--max-steps", 10)
    assert code == 0 and "warmup: 1 of 10 steps" in text
    assert [line["lr"] for line in log(out)[:2]] == [0, 1e-3]
    for more in ((), ("--warmup", 1)):
        assert "already finished after 10 steps" in run(*args, "--max-steps", 10, *more, "--resume")[1]
    assert "differs in warmup" in run(*args, "--max-steps", 10, "--warmup", 0, "--resume")[2]


def test_the_summary_names_the_first_and_the_last_loss(tiny, data, tmp_path, run):
    text = run("train_sft", *flags(tiny, data, tmp_path / "o"))[1]
    losses = [line["loss"] for line in log(tmp_path / "o")]
    assert f"\nloss {losses[0]:.4g} in step 1, {losses[-1]:.4g} in step 8\n" in text


def test_the_line_of_the_losses():
    skipped = {"step": 1, "loss": None}
    first, last = ({"step": n, "loss": n / 3, "rewards/margins": 0.125 * n} for n in (2, 5))
    margins = "loss 0.6667 in step 2, 1.667 in step 5; reward margin 0.25 in step 2, 0.625 in step 5"
    assert first_and_last([skipped, first, last, skipped]) == [margins]
    assert first_and_last([first | {"rewards/margins": None}]) == ["loss 0.6667 in step 2"]
    assert first_and_last([first, last | {"eval_loss": 2.5}]) == [f"{margins}; eval_loss 2.5 in step 5"]
    assert first_and_last([skipped]) == first_and_last([]) == []
    assert first_and_last([first | {"rewards/margins": -1.375e-07}]) == [
        "loss 0.6667 in step 2; reward margin 0 in step 2"
    ]


def test_a_step_is_printed_once_a_minute_where_there_is_no_progress_bar(monkeypatch, capsys):
    state, step = SimpleNamespace(total=900, printed=1000.0), {"step": 7, "loss": 2 / 3, "lr": 1e-6}
    for seconds, record, line in (
        (1059.0, step, ""),
        (1060.0, step, "step 7 of 900: loss 0.6667, lr 1e-06\n"),
        (1119.0, step, ""),
        (1121.0, step | {"tokens_per_second": 1234.5}, "step 7 of 900: loss 0.6667, lr 1e-06, 1,234 tokens/s\n"),
    ):
        monkeypatch.setattr("training.run.time.time", lambda: seconds)
        print_progress(state, record)
        assert capsys.readouterr().out == line
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("training.run.time.time", lambda: 9000.0)
    print_progress(state, step)
    assert capsys.readouterr().out == ""


def test_examples_that_are_cut_are_counted(tiny, tmp_path, run):
    """By --max-len 64: one in its reply, one at its last newline alone, one in a later question."""
    tok = Tokenizer(tiny)
    turn = lambda role, content: {"role": role, "content": content}
    two = [turn("user", "a"), turn("assistant", "b"), turn("user", "x " * 60)]
    edge = next(
        messages
        for n in range(100)
        for messages in [[turn("user", "a"), turn("assistant", "=" * n)]]
        if len(tok.chat_ids(messages)[0]) == 65
    )
    long = [turn("user", "a"), turn("assistant", "b c " * 40)]
    records = [*chats(4), {"messages": two}, {"messages": edge}, {"messages": long}]
    lost = sum(max(0, len(tok.chat_ids(r["messages"])[0]) - 64) for r in records)
    data = write_lines(tmp_path / "d.jsonl", records)
    _, text, _ = run("train_sft", *flags(tiny, data, tmp_path / "o"))
    assert (
        f"3 of 7 examples cut to 64 tokens (--max-len): {lost} tokens lost; 1 examples lost their last <|im_end|>"
        in text
    )
    assert " cut to " not in run("train_sft", *flags(tiny, data, tmp_path / "p", "--max-len", 1000))[1]


def test_held_out_examples_that_are_cut_or_dropped_are_counted(tiny, data, tmp_path, run):
    conversation = lambda *texts: [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    long, hidden = conversation("a", "b c " * 40), conversation("a " * 60, "b")
    lost = len(Tokenizer(tiny).chat_ids(long)[0]) - 64
    held_out = write_lines(tmp_path / "e.jsonl", [*chats(2), {"messages": long}, {"messages": hidden}])
    _, text, _ = run("train_sft", *flags(tiny, data, tmp_path / "o", "--eval-data", held_out))
    assert "1 held-out examples dropped (nothing to predict within 64 tokens)" in text
    assert f"1 of 3 held-out examples cut to 64 tokens (--max-len): {lost} tokens lost; 1 examples lost" in text


def test_a_base_models_fine_tune_ends_at_im_end(data, tmp_path, run):
    files = tiny_files()
    settings = json.loads(files["tokenizer_config.json"]) | {"eos_token": "<|endoftext|>"}
    files["tokenizer_config.json"] = json.dumps(settings)
    files["special_tokens_map.json"] = json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    for name, end, want in (
        ("one", 0, [2, 0]),
        ("many", [0, 7], [2, 0, 7]),
        ("none", None, [2]),
        ("chat", [0, 2], [0, 2]),
    ):
        base = str(tmp_path / name)
        files["generation_config.json"] = json.dumps({"eos_token_id": end, "top_k": 20})
        tiny_model(eos_token_id=None).save(base, files)
        assert run("train_sft", *flags(base, data, tmp_path / f"{name}.pt", "--max-steps", 1))[0] == 0
        written = Checkpoint(tmp_path / f"{name}.pt").files
        assert json.loads(written["generation_config.json"]) == {"eos_token_id": want, "top_k": 20}
        if name == "chat":
            assert written == files
        else:
            assert json.loads(written["tokenizer_config.json"]) == settings | {"eos_token": "<|im_end|>"}
            tokens = json.loads(written["special_tokens_map.json"])
            assert tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        assert Checkpoint(base).files == files


def test_dropout_in_the_config_is_warned_of(data, tmp_path, run):
    """transformers applies it in training, and this code does not."""
    for dropout, said in (0.1, True), (0.0, False):
        ckpt = tmp_path / f"ckpt-{dropout}"
        tiny_model(attention_dropout=dropout).save(str(ckpt), tiny_files())
        code, out, _ = run("train_sft", *flags(ckpt, data, tmp_path / f"out-{dropout}", "--max-steps", 1))
        assert code == 0
        assert ("attention_dropout is 0.1; dropout is not implemented, so this run trains without it" in out) == said
