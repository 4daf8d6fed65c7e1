"""eval.py: whole runs on a tiny random model and tiny data; resuming, rescoring, comparing, ranks."""

import argparse
import glob
import json
import math
import os
import re

import pytest
import torch
from conftest import ROOT, tiny_files, tiny_model, write_lines
from tiny_benchmarks import write_benchmarks
from training_runs import launch

from core.checkpoint import Checkpoint
from core.distributed import Ranks
from core.tokenizer import Tokenizer
from eval import other_metrics, results_table
from evaluation import benchmarks, downloads, replies, rows
from evaluation.flags import checkpoint_names
from evaluation.replies import collect_replies, question_keys
from generate import generate_iter
from model import Qwen2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("data"))


def test_limit_is_spread_over_subjects():
    rows = [{"subject": s, "id": f"{s}{i}"} for s, n in (("a", 4), ("b", 1), ("c", 3)) for i in range(n)]
    assert [r["id"] for r in benchmarks.take_per_subject(rows, 2)] == ["a0", "b0"]
    assert [r["id"] for r in benchmarks.take_per_subject(rows, 5)] == ["a0", "a1", "b0", "c0", "c1"]
    assert benchmarks.take_per_subject(rows, 100) == rows
    assert [r["id"] for r in benchmarks.take_per_subject([{"id": i} for i in range(5)], 3)] == [0, 1, 2]


# ---------------------------------------------------------------- a tiny checkpoint


def tiny_checkpoint(out, seed, positions=2048):
    """Random weights large enough for replies that differ from prompt to prompt."""
    m = tiny_model(seed, tie_word_embeddings=False, initializer_range=0.5, max_position_embeddings=positions)
    m.save(str(out), tiny_files())
    return str(out)


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    d = tmp_path_factory.mktemp("ckpt")
    return [tiny_checkpoint(d / "base", 1), tiny_checkpoint(d / "sft.pt", 2)]


@pytest.fixture
def evaluate(run):
    """eval.py with these arguments, which succeeds; its stdout."""

    def call(*args):
        code, out, err = run("eval", *args)
        assert code == 0, err
        return out

    return call


def load(out):
    with open(out / "samples.jsonl", encoding="utf-8") as f:
        samples = [json.loads(line) for line in f]
    return json.loads((out / "results.json").read_text()), samples


def test_all_tasks(evaluate, tmp_path, data, ckpts):
    out = tmp_path / "out"
    tasks = ["demo", "gsm8k", "mmlu", "cmmlu", "ceval", "humaneval", "mbpp", "ifeval", "safetybench"]
    more = "--max-new-tokens 8 --batch-size 3 --allow-code-execution".split()
    shown = evaluate("--ckpt", *ckpts, "--tasks", *tasks, "--data-dir", data, *more, "--out", out)
    results, samples = load(out)
    assert list(results) == ["base", "sft"] and list(results["base"]) == tasks
    n = {
        "demo": 3,
        "gsm8k": 3,
        "mmlu": 5,
        "cmmlu": 5,
        "ceval": 5,
        "humaneval": 1,
        "mbpp": 1,
        "ifeval": 1,
        "safetybench": 1,
    }
    for name, cells in results.items():
        for task, cell in cells.items():
            mine = [s for s in samples if s["checkpoint"] == name and s["task"] == task]
            verdicts = [s["correct"] for s in mine]
            assert cell["n"] == n[task] == len(mine) and cell["protocol"] == "paper" and 0 <= cell["score"] <= 1
            if task == "ceval":
                art, botany = verdicts[:3], verdicts[3:]
                assert cell["score"] == pytest.approx((sum(art) / 3 + sum(botany) / 2) / 2)
            else:
                assert cell["score"] == pytest.approx(sum(verdicts) / n[task])
            assert ("vs_first" in cell) == (name == "sft")
            if name == "sft":
                versus, first = cell["vs_first"], results["base"][task]["score"]
                assert versus["difference"] == pytest.approx(cell["score"] - first)
                assert versus["p"] <= versus["p_holm"] <= 1 and versus["interval"][0] <= versus["interval"][1]
                assert versus["test"] == ("bootstrap" if task == "ceval" else "McNemar")
    assert set(results["base"]["ifeval"]["metrics"]) == {"prompt_loose", "instruction_strict", "instruction_loose"}
    assert {"checkpoint", "task", "id", "prompt", "reply", "extracted", "correct"} <= set(samples[0])
    assert samples[0]["prompt"] == [{"role": "user", "content": "2+2?"}] and samples[0]["id"] == "sum-1"
    assert samples[6]["id"] == "art_history/0" and samples[-4]["id"] == "HumanEval/0"
    tokenizer = Tokenizer(Checkpoint(ckpts[0]))
    assert samples[0]["prompt_tokens"] == len(tokenizer.prompt_ids(samples[0]["prompt"]))
    assert all(s["reply_tokens"] == len(tokenizer.encode(s["reply"])) for s in samples)
    assert len({s["reply"] for s in samples}) > 5  # the tiny models do say something, and not the same
    written = (out / "results.md").read_text()
    assert "Not significant: sft on demo" in written and "Further figures:" in written
    assert written in shown and "mmlu: 5 questions, 2 subjects" in shown
    assert "| sft |" in written and "gsm8k (paper, n = 3)" in written
    assert not glob.glob(str(out / "*tmp*"))

    # batching and the company of other questions change no reply
    alone = tmp_path / "alone"
    more = "--max-new-tokens 8 --batch-size 1 --limit 2".split()
    evaluate("--ckpt", ckpts[1], "--tasks", "mmlu", "--data-dir", data, *more, "--out", alone)
    results, few = load(alone)
    assert [s["id"] for s in few] == ["art_history/0", "botany/0"] and results["sft"]["mmlu"]["n"] == 2
    assert {s["id"]: s["reply"] for s in few}.items() <= {
        s["id"]: s["reply"] for s in samples if s["checkpoint"] == "sft" and s["task"] == "mmlu"
    }.items()


def test_resume(monkeypatch, run, evaluate, tmp_path, data, ckpts):
    """After an interruption only what is missing is asked; verdicts are read anew; other settings ask anew."""
    out, asked, calls = tmp_path / "out", [], []
    args = ["--ckpt", ckpts[0], "--tasks", "demo", "mmlu", "--data-dir", data, "--max-new-tokens", 5, "--out", out]
    iterate = generate_iter

    def counting(m, tokenizer, prompts, stop_after=100, **settings):
        calls.append(len(prompts))
        for i, item in enumerate(iterate(m, tokenizer, prompts, **settings)):
            if len(asked) == stop_after:
                raise KeyboardInterrupt
            asked.append(i)
            yield item

    monkeypatch.setattr(replies, "generate_iter", lambda *a, **k: counting(*a, stop_after=5, **k))
    assert run("eval", *args)[0] == 130
    assert sorted(os.listdir(out)) == [".written.json", "checkpoints.json", "replies.jsonl"]
    with open(out / "replies.jsonl", "a") as f:
        f.write('{"key": "torn')
    monkeypatch.setattr(replies, "generate_iter", counting)
    evaluate(*args)
    assert len(asked) == 8 and calls == [8, 3]  # the questions of all tasks in one call
    whole = load(out)
    evaluate(*args)
    assert len(asked) == 8 and load(out) == whole
    reference = tmp_path / "reference"
    evaluate(*args[:-1], reference)
    assert len(asked) == 16 and load(reference) == whole
    evaluate(*args, "--max-new-tokens", 6)
    assert len(asked) == 24
    evaluate(*args, "--ckpt", ckpts[1])
    assert len(asked) == 32
    evaluate(*args, "--cache-gb", 0.001)  # of the machine, not of the replies
    assert len(asked) == 32
    text = (out / "replies.jsonl").read_text()
    (out / "replies.jsonl").write_text(text.replace(json.loads(text.splitlines()[0])["code"], "that of yesterday"))
    assert "warning: 8 replies of base in" in evaluate(*args) and len(asked) == 32


def test_results_that_a_command_replaces_are_named(monkeypatch, evaluate, tmp_path, data, ckpts):
    base, sft = ckpts
    out, more = tmp_path / "out", ("--data-dir", data, "--max-new-tokens", 5, "--out", tmp_path / "out")
    shown = evaluate("--ckpt", base, "--tasks", "demo", "mmlu", *more)
    assert "next: add checkpoints or tasks to this command" in shown and "no longer" not in shown
    shown = evaluate("--ckpt", sft, "--tasks", "demo", *more)
    assert "no longer have base, mmlu (paper); name all in one command" in shown and list(load(out)[0]) == ["sft"]
    monkeypatch.setattr(replies, "generate_iter", None)  # no reply is generated again
    shown = evaluate("--ckpt", base, sft, "--tasks", "demo", *more)
    assert "no longer" not in shown and list(load(out)[0]) == ["base", "sft"]
    assert "of 3 questions" in evaluate("compare", "base", "sft", "--out", out)
    assert "no longer have sft;" in evaluate("--ckpt", base, "--tasks", "demo", *more)
    for broken in ("[1]", "{", '{"base": 1}', '{"base": {"demo": 1}}'):
        (out / "results.json").write_text(broken)
        assert "no longer" not in evaluate("--ckpt", base, "--tasks", "demo", *more)


def test_a_repetition_penalty_is_another_protocol(evaluate, refused, tmp_path, data, ckpts):
    """Its replies never stand in for those without, neither in a later run nor under --rescore."""
    out = tmp_path / "out"
    args = ["--ckpt", ckpts[0], "--tasks", "demo", "--data-dir", data, "--max-new-tokens", 12, "--out", out]
    evaluate(*args)
    plain = load(out)
    assert "repetition_penalty" not in plain[1][0]
    evaluate(*args, "--repetition-penalty", 1.3)
    results, samples = load(out)
    assert results["base"]["demo"]["protocol"] == "paper, repetition penalty 1.3"
    assert "demo (paper, repetition penalty 1.3, n = 3)" in (out / "results.md").read_text()
    assert {s["repetition_penalty"] for s in samples} == {1.3}
    assert [s["reply"] for s in samples] != [s["reply"] for s in plain[1]]
    assert len((out / "replies.jsonl").read_text().splitlines()) == 6
    for again in ([], ["--rescore"]):
        evaluate(*args, *again)
        assert load(out) == plain
        evaluate(*args, "--repetition-penalty", 1.3, *again)
        assert load(out) == (results, samples)
    refused(
        "penalty 1.2, fp32, at most 12 tokens) are missing", "eval", *args, "--repetition-penalty", 1.2, "--rescore"
    )
    refused("has none", "eval", *args, "--tasks", "mmlu", "--protocol", "loglik", "--repetition-penalty", 1.2)


def test_room_for_a_reply(evaluate, refused, tmp_path, data):
    """The model's positions end before --max-new-tokens: shorter replies; a refusal where the prompt alone is too long."""
    out, short = tmp_path / "out", tiny_checkpoint(tmp_path / "short", 3, positions=80)
    args = ["--ckpt", short, "--data-dir", data, "--out", out]
    evaluate(*args, "--tasks", "demo")
    results, samples = load(out)
    assert results["short"]["demo"]["n"] == 3
    assert results["short"]["demo"]["cut_short"] == sum(s["finish_reason"] == "length" for s in samples)
    refused("the model has 80 positions", "eval", *args, "--tasks", "gsm8k")
    refused("the model has 80 positions", "eval", *args, "--tasks", "mmlu", "--protocol", "loglik")


def test_the_table_says_how_many_replies_were_cut_off():
    cell = {"score": 0.5, "stderr": 0.1, "n": 5, "protocol": "paper"}
    shown = results_table({"a": {"gsm8k": cell | {"cut_short": 2}, "demo": cell | {"cut_short": 0}}})
    assert "- a, gsm8k: 2 of 5 replies cut off at the maximum length\n" in shown and "- a, demo" not in shown


def test_loglik(evaluate, tmp_path, data, ckpts):
    """Letters' log-likelihoods with a shared prefix are those of one plain forward each."""
    out = tmp_path / "out"
    evaluate("--ckpt", ckpts[0], "--tasks", "mmlu", "--protocol", "loglik", "--data-dir", data, "--out", out)
    results, samples = load(out)
    cell = results["base"]["mmlu"]
    assert cell["protocol"] == "loglik" and cell["n"] == 5
    assert "mmlu (loglik, n = 5)" in (out / "results.md").read_text()
    context = samples[4]["prompt"][0]["content"]
    assert context.startswith(
        "The following are multiple choice questions (with answers) about botany.\n\n"
        "shot 0\nA. p\nB. q\nC. r\nD. s\nAnswer: D\n\nshot 1\nA. p\nB. q\nC. r\nD. s\nAnswer: C\n\n"
    )
    assert context.count("Answer:") == 6 and "shot 5" not in context
    assert context.endswith('Answer: D\n\nbotany 1, and?\nTwo lines\nA. None\nB. 1,5\nC. "x"\nD. d1\nAnswer:')
    ckpt = Checkpoint(ckpts[0])
    m, tokenizer = Qwen2.from_pretrained(ckpt), Tokenizer(ckpt)
    for s in samples:
        context = s["prompt"][0]["content"]
        n = len(tokenizer.encode(context))
        for letter, logp in zip("ABCD", s["logps"], strict=True):
            ids = torch.tensor([tokenizer.encode(f"{context} {letter}")])
            with torch.no_grad():
                table = m(ids).log_softmax(-1)[0, n - 1 : -1]
            assert logp == pytest.approx(table.gather(1, ids[0, n:, None]).sum().item(), abs=1e-4)
        assert s["extracted"] == s["reply"] == "ABCD"[s["logps"].index(max(s["logps"]))]
        assert s["correct"] == (s["extracted"] == "ABCD"[int(s["id"].split("/")[1])])


# ---------------------------------------------------------------- bad input


def test_refusals(run, refused, tmp_path, data, ckpts, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    common = ["eval", "--ckpt", ckpts[0], "--data-dir", data, "--out", tmp_path / "out", "--tasks"]
    refused(["gsm9k", *benchmarks.BENCHMARKS], *common, "demo", "gsm9k")
    refused("--allow-code-execution", *common, "gsm8k", "humaneval")
    refused("not implemented for gsm8k", *common, "gsm8k", "--protocol", "loglik")
    refused("not implemented for truthfulqa_mc1", *common, "truthfulqa_mc1")
    refused("eval.py judge", *common, "mt_bench")
    refused("--allow-code-execution", *common, "mbpp")
    refused([f"no {ckpts[0]}, only nothing", "leave --rescore out"], *common, "demo", "--rescore")
    refused("twice", *common, "demo", "--ckpt", ckpts[0], ckpts[0])
    refused("nothere", *common, "demo", "--ckpt", ckpts[0], tmp_path / "nothere")
    refused("heldout.jsonl", *common, "demo", "--data-dir", tmp_path)
    refused(["test.jsonl", "https://", "HF_HUB_OFFLINE"], *common, "gsm8k", "--data-dir", tmp_path)
    (tmp_path / "file").write_text("")
    refused("file", *common, "demo", "--out", tmp_path / "file")
    for limit in ("0", "-3", "x"):
        code, _, err = run(*common, "demo", "--limit", limit)
        assert code == 2 and "--limit" in err
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize("task", list(benchmarks.BENCHMARKS))
def test_without_data_a_line_says_which_file_to_put_where(task, refused, tmp_path, ckpts, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(downloads, "hf_hub_download", offline)
    bench, script = benchmarks.BENCHMARKS[task], ["eval"]
    if "prompt" in bench and "verdict" not in bench:
        script = ["eval", "judge", "--teacher", "http://localhost:9/v1"]
    more = (
        ["--protocol", "loglik"]
        if "prompt" not in bench
        else ["--allow-code-execution"]
        if bench.get("runs_code")
        else []
    )
    paths = ["--data-dir", tmp_path / "none", "--out", tmp_path / "out"]
    words = [f"{tmp_path}/none/", "--data-dir", ": missing"]
    refused(words, *script, "--ckpt", *ckpts, "--tasks", task, *more, *paths)
    assert not os.path.exists(tmp_path / "out") and not os.path.exists(tmp_path / "none")


def test_a_new_benchmark_is_an_entry(evaluate, tmp_path, ckpts, monkeypatch):
    """The entry of docs/benchmarks.md is all that it takes."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/benchmarks.md").read_text(), re.M | re.S)
    ((name, entry),) = eval(f"{{{block}}}", {"json_rows": rows.json_rows}).items()
    monkeypatch.setitem(benchmarks.BENCHMARKS, name, entry)
    capitals = [{"country": "France", "capital": "Paris"}, {"country": "Peru", "capital": "Lima"}]
    write_lines(tmp_path / "capitals.jsonl", capitals)
    common = ["--ckpt", ckpts[0], "--data-dir", tmp_path, "--out", tmp_path / "out"]
    evaluate(*common, "--tasks", "capitals", "--max-new-tokens", 6)
    results, samples = load(tmp_path / "out")
    assert results["base"]["capitals"]["n"] == 2
    assert samples[1]["prompt"][0]["content"] == "What is the capital of Peru?"
    assert samples[0]["extracted"] == samples[0]["reply"].strip() and samples[0]["correct"] is False


def test_code_in_the_demo_needs_permission(evaluate, refused, tmp_path, ckpts):
    (tmp_path / "demo").mkdir()
    code = {"kind": "code", "value": {"tests": "assert f", "entry_point": "f"}}
    write_lines(tmp_path / "demo/heldout.jsonl", [{"id": 1, "prompt": "f", "reference": code}])
    args = ["--ckpt", ckpts[0], "--tasks", "demo", "--data-dir", tmp_path, "--out", tmp_path / "o"]
    args += ["--max-new-tokens", 4]
    refused("--allow-code-execution", "eval", *args)
    evaluate(*args, "--allow-code-execution")


def test_names():
    assert checkpoint_names(["runs/demo/base", "runs/demo/sft.pt", "Qwen/Qwen2"]) == ["base", "sft", "Qwen2"]
    assert checkpoint_names(["a/model/", "b/model.pt"]) == ["a/model/", "b/model.pt"]


# ---------------------------------------------------------------- likelihoods of choices and texts


def logp_of(m, tokenizer, context, text):
    """By one plain forward over the whole text."""
    n, ids = len(tokenizer.encode(context)), torch.tensor([tokenizer.encode(context + text)])
    with torch.no_grad():
        table = m(ids).log_softmax(-1)[0, n - 1 : -1]
    return table.gather(1, ids[0, n:, None]).sum().item()


def test_loglik_of_all_tasks(evaluate, tmp_path, data, ckpts):
    out = tmp_path / "out"
    tasks = [
        "cmmlu",
        "ceval",
        "safetybench",
        "truthfulqa_mc1",
        "truthfulqa_mc2",
        "arc_easy",
        "arc_challenge",
        "hellaswag",
    ]
    evaluate(
        "--ckpt", *ckpts, "--tasks", *tasks, "--protocol", "loglik", "--data-dir", data, "--batch-size", 2, "--out", out
    )
    results, samples = load(out)
    assert list(results["base"]) == tasks
    ckpt = Checkpoint(ckpts[0])
    m, tokenizer = Qwen2.from_pretrained(ckpt), Tokenizer(ckpt)
    rows = {
        (task, row["id"]): row for task in tasks for row in benchmarks.BENCHMARKS[task]["rows"](lambda n: str(data / n))
    }
    for s in (s for s in samples if s["checkpoint"] == "base"):
        row, by = rows[s["task"], s["id"]], benchmarks.BENCHMARKS[s["task"]]["by"]
        texts = [f" {x}" for x in (row["choices"] if by == "letter" else row["choices"].values())]
        want = [logp_of(m, tokenizer, s["prompt"][0]["content"], text) for text in texts]
        assert s["logps"] == pytest.approx(want, abs=2e-4)
        if s["task"] != "truthfulqa_mc2":
            assert s["correct"] == (list(row["choices"])[want.index(max(want))] == row["answer"])
    p = torch.tensor([s["logps"] for s in samples if s["task"] == "truthfulqa_mc2"][0]).softmax(0)
    assert results["base"]["truthfulqa_mc2"]["score"] == pytest.approx(p[:2].sum().item(), abs=1e-5)
    assert "acc_norm" in results["base"]["hellaswag"]["metrics"] and "metrics" not in results["base"]["cmmlu"]
    assert results["base"]["cmmlu"]["calibration"]["bins"] and "calibration" not in results["base"]["truthfulqa_mc2"]
    assert "expected calibration error" in (out / "results.md").read_text()


def test_perplexity(evaluate, tmp_path, data):
    """Also of a text longer than the model's positions, in the windows of the harness."""
    short = tiny_checkpoint(tmp_path / "short", 3, positions=20)
    evaluate(
        "--ckpt", short, "--tasks", "perplexity", "--protocol", "loglik", "--data-dir", data, "--out", tmp_path / "out"
    )
    results, samples = load(tmp_path / "out")
    m, tokenizer = Qwen2.from_pretrained(short), Tokenizer(Checkpoint(short))
    for s in samples:
        ids = torch.tensor([tokenizer.prefix, *tokenizer.encode(s["prompt"][0]["content"])])
        # token t is predicted from what its window holds before it: those of 20 begin at 0, 20, 40, ..., the last one earlier
        n = len(ids) - 1
        before = [ids[None, max(0, min((t - 1) // 20 * 20, n - 20)) : t] for t in range(1, len(ids))]
        with torch.no_grad():
            logps = [m(x)[0, -1].log_softmax(-1)[ids[t]].item() for t, x in enumerate(before, 1)]
        assert s["logp"] == pytest.approx(sum(logps), rel=1e-5) and s["prompt_tokens"] == len(ids) - 1
    assert max(s["prompt_tokens"] for s in samples) > 60
    metrics, tokens = results["short"]["perplexity"]["metrics"], sum(s["prompt_tokens"] for s in samples)
    nll = -sum(s["logp"] for s in samples) / tokens
    assert (
        metrics["perplexity"]["score"] == pytest.approx(math.exp(nll))
        and 0 <= results["short"]["perplexity"]["score"] <= 1
    )
    size = sum(len(s["prompt"][0]["content"].encode()) for s in samples)
    assert metrics["bits_per_byte"]["score"] == pytest.approx(nll * tokens / math.log(2) / size)


# ---------------------------------------------------------------- without the model


def test_rescore(evaluate, tmp_path, data, ckpts, monkeypatch):
    """The same results from what OUT holds alone; another extraction gives other verdicts."""
    out = tmp_path / "out"
    args = ["--tasks", "demo", "mmlu", "--data-dir", data, "--max-new-tokens", 5, "--out", out]
    evaluate("--ckpt", *ckpts, *args)
    evaluate("--ckpt", *ckpts, "--tasks", "mmlu", "--data-dir", data, "--out", out, "--protocol", "loglik")
    evaluate("--ckpt", *ckpts, *args)
    whole = load(out)
    monkeypatch.setattr(replies, "Checkpoint", None)
    evaluate("--ckpt", *ckpts, *args, "--rescore")
    assert load(out) == whole
    monkeypatch.setitem(benchmarks.BENCHMARKS["mmlu"], "verdict", lambda reply, row: ("A", True))
    evaluate("--ckpt", ckpts[0], *args, "--rescore")
    assert load(out)[0]["base"]["mmlu"]["score"] == 1


def test_rescore_reads_the_replies_to_these_questions_of_this_checkpoint(evaluate, refused, tmp_path, ckpts):
    """Equal prompts and equal checkpoints share their replies; other checkpoints, questions and settings share none."""
    question = lambda id, prompt, value: {"id": id, "prompt": prompt, "reference": {"kind": "exact", "value": value}}
    for folder in ("demo", "other/demo"):
        (tmp_path / folder).mkdir(parents=True)
    write_lines(
        tmp_path / "demo/heldout.jsonl", [question(1, "Hi?", "a"), question(2, "Hi?", "b"), question(3, "Ho?", "c")]
    )
    write_lines(
        tmp_path / "other/demo/heldout.jsonl",
        [question(1, "Hi?", "a"), question(2, "He?", "b"), question(3, "Ho?", "c")],
    )
    a, b = (tiny_checkpoint(tmp_path / f"{x}/model", seed) for x, seed in (("a", 1), ("b", 2)))
    args = ["--tasks", "demo", "--data-dir", tmp_path, "--max-new-tokens", 6, "--out", tmp_path / "out"]

    def samples(*args):
        evaluate(*args)
        return load(tmp_path / "out")[1]

    both = samples("--ckpt", a, ckpts[0], *args)  # the two are equal
    assert len((tmp_path / "out/replies.jsonl").read_text().splitlines()) == 2
    assert samples("--ckpt", a, ckpts[0], *args, "--rescore") == both
    first, second = both[:3], samples("--ckpt", b, *args)  # of the same short name
    assert [s["reply"] for s in first] != [s["reply"] for s in second]
    assert samples("--ckpt", a, *args, "--rescore") == first
    assert samples("--ckpt", b, *args, "--rescore") == second
    for more, words in (
        (["--data-dir", tmp_path / "other"], "1 of the 3"),
        (["--max-new-tokens", 5], "3 of the 3"),
        (["--dtype", "bf16"], "bf16"),
        (["--ckpt", tmp_path / "c"], f"no {tmp_path / 'c'}, only {a}"),
    ):
        refused(words, "eval", "--ckpt", a, *args, *more, "--rescore")
    tiny_checkpoint(a, 2)  # trained again: now what b is
    assert samples("--ckpt", a, *args) == samples("--ckpt", a, *args, "--rescore") == second


def test_keys_do_not_change(data):
    """The replies of earlier runs are found by them."""
    a = argparse.Namespace(protocol="paper", dtype="fp32", max_new_tokens=9, repetition_penalty=1.0)
    q = {"messages": [{"role": "user", "content": "Hé?"}], "key_parts": []}
    first = question_keys(a, {"demo": [q]}, "f", [1, 2])
    assert first == {"demo": ["0e87d8c5210b47f1a5d3f8fb7f128e929044388c27a6e3c983fb6019f2b61de1"]}
    a.repetition_penalty, q["key_parts"] = 1.5, [["x"]]
    assert question_keys(a, {"demo": [q]}, "f", [1, 2]) == {
        "demo": ["2ed83ae0110d94a9dd5e4b97ad1cb6ad9c1936ba96cf624d3cfe923b28e309ed"]
    }


def test_compare_two(run, refused, tmp_path):
    def sample(name, task, id, correct, reply):
        prompt = [{"role": "user", "content": f"Question {id}"}]
        return {
            "checkpoint": name,
            "task": task,
            "id": id,
            "prompt": prompt,
            "reply": reply,
            "extracted": reply[:1],
            "correct": correct,
        }

    lines = [sample("a", "t", i, i < 3, f"{i} of a") for i in range(4)]
    lines += [sample("org/b", "t", i, i in (0, 3), f"{i} of b") for i in range(4)]
    write_lines(tmp_path / "samples.jsonl", lines)
    code, out, _ = run("eval", "compare", "a", "org/b", "--out", tmp_path)
    assert code == 0 and "t: a better on 2, org/b on 1, of 4 questions: -25.0 points, p = 1 (McNemar)" in out
    text = (tmp_path / "a-vs-org_b.md").read_text()
    assert [f"Question {i}" in text for i in range(4)] == [False, True, True, True]
    assert "### a: 1, read as '1'\n\n1 of a\n\n### org/b: 0, read as '1'\n\n1 of b" in text
    code, again, _ = run("eval", "compare", "./a.pt", "org/b", "--out", tmp_path)  # the checkpoint's path
    assert (code, again) == (0, out)
    refused(["'c'", "a, org/b"], "eval", "compare", "a", "c", "--out", tmp_path)
    refused("samples.jsonl", "eval", "compare", "a", "b", "--out", tmp_path / "none")
    for key, value in ("correct", None), ("correct", "x"), ("prompt", []), ("prompt", "q"), ("id", [1]), ("reply", ...):
        broken = lines[1] | {key: value} if value is not ... else {k: v for k, v in lines[1].items() if k != key}
        write_lines(tmp_path / "samples.jsonl", [lines[0], broken])
        refused("samples.jsonl:2: is not a sample", "eval", "compare", "a", "org/b", "--out", tmp_path)
    write_lines(tmp_path / "samples.jsonl", [*lines, lines[0]])
    says = f"samples.jsonl:{len(lines) + 1}: t has two questions of the id 0"
    refused([says, "own"], "eval", "compare", "a", "org/b", "--out", tmp_path)


def test_two_ranks_are_one(evaluate, tmp_path, data, ckpts):
    """Each rank asks its share; the results are those of one process, and nothing is asked twice."""
    args = ["--ckpt", *ckpts, "--tasks", "demo", "mmlu", "--data-dir", data, "--max-new-tokens", 5, "--device", "cpu"]
    evaluate(*args, "--out", tmp_path / "one")
    two = tmp_path / "two"
    codes, texts = launch("eval", (*args, "--out", two), tmp_path / "text", 2)
    assert codes == [0, 0], texts
    assert load(two) == load(tmp_path / "one")
    counts = [len((two / f"replies{rank}.jsonl").read_text().splitlines()) for rank in ("", ".rank1")]
    assert sum(counts) == 2 * (3 + 5) and abs(counts[0] - counts[1]) <= 4
    evaluate(*args, "--out", two)  # and one process goes on where two were
    assert load(two) == load(tmp_path / "one")


def test_a_rank_that_is_late_asks_its_own_share(tmp_path, data, ckpts, monkeypatch):
    """Rank 0 asks all of its questions at the first barrier of rank 1, which must have read OUT by then."""
    a = argparse.Namespace(
        ckpt=ckpts[:1],
        out=str(tmp_path / "out"),
        data_dir=str(data),
        limit=None,
        protocol="paper",
        max_new_tokens=4,
        repetition_penalty=1.0,
        batch_size=4,
        cache_gb=1.0,
        dtype="fp32",
        allow_code_execution=False,
    )
    work, met = {"demo": benchmarks.load_questions("demo", a)}, []

    def barrier():
        met.append(len(met))
        if len(met) == 1:
            with pytest.raises(KeyError):  # of what is rank 1's
                collect_replies(a, ["base"], work, Ranks(0, 2))

    monkeypatch.setattr(replies.dist, "barrier", barrier)
    said = collect_replies(a, ["base"], work, Ranks(1, 2))["base"]["demo"]
    assert [record["id"] for record in said] == ["sum-1", "say-1", "pick-1"] and len(met) == 4


def test_the_perplexity_of_a_diverged_model_is_a_number():
    found = other_metrics([{"nll_per_token": (2400.0, 3)}, {"nll_per_token": (2200.0, 3)}], [None, None], [0, 0])
    assert math.isfinite(found["metrics"]["perplexity"]["score"]) and found["metrics"]["nll_per_token"]["score"] > 709
