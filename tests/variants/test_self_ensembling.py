"""Self-ensembling: combinations by hand, equality with eval.py's first prompt, the other prompts, refusals."""

import functools
import json
from argparse import Namespace

import pytest
import torch
from tiny_benchmarks import write_benchmarks

from evaluation.benchmarks import load_questions
from evaluation.downloads import find_data_file
from variants.self_ensembling import combine, score, vary_prompts

P = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize(
    "method, want, label, confidence",
    [
        ("mean", [0.433, 0.467, 0.1], 1, 0.467),
        ("max", [0.6 / 1.4, 0.5, 0.1 / 1.4], 1, 0.5),
        ("vote", [0.55, 0.35, 0.1], 0, 0.55),
    ],
)
def test_combinations_by_hand(method, want, label, confidence):
    found = combine(P, method)
    assert found.tolist() == pytest.approx(want, abs=5e-4) and found.sum().item() == pytest.approx(1)
    assert found.argmax().item() == label and found.max().item() == pytest.approx(confidence, abs=5e-4)


def test_a_vote_weighs_its_confidence_and_leaves_the_losers_out():
    p = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.3, 0.3], [0.05, 0.9, 0.05]])
    assert combine(p, "vote").tolist() == pytest.approx([0.05, 0.9, 0.05]), "0.9 outweighs 0.4 + 0.4"


@pytest.mark.parametrize("method", ["mean", "max", "vote"])
def test_one_prompt_or_equal_prompts_change_nothing(method):
    for p in P[:1], P[:1].repeat(4, 1):
        assert combine(p, method).tolist() == pytest.approx(P[0].tolist())


def test_ece_by_hand():
    """Two confident mistakes and two confident hits: |0.5 - 0.9| before; a doubtful ensemble is calibrated."""
    sure, doubtful = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.4, 0.1])
    assert score([sure] * 4, [0, 0, 1, 1]) == pytest.approx({"accuracy": 0.5, "confidence": 0.9, "ece": 0.4})
    assert score([doubtful] * 4, [0, 0, 1, 1])["ece"] == pytest.approx(0.0, abs=1e-6)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return write_benchmarks(tmp_path / "data")


def test_other_prompts_hold_the_same_examples_in_another_order(data):
    args = Namespace(protocol="loglik", data_dir=str(data), limit=None, allow_code_execution=False)
    find = functools.partial(find_data_file, str(data))
    questions = load_questions("mmlu", args)
    prompts = vary_prompts("mmlu", questions, 4, find, 0)
    assert len(prompts) == 4 and prompts[0] == [q["messages"][0]["content"] for q in questions]
    assert prompts == vary_prompts("mmlu", questions, 4, find, 0) != vary_prompts("mmlu", questions, 4, find, 7)
    for i in range(len(questions)):
        texts = [some[i] for some in prompts]
        assert len(set(texts)) > 1 and len({tuple(sorted(text.split("\n\n"))) for text in texts}) == 1
        assert len({text.split("\n\n")[-1] for text in texts}) == 1, "the question stays last"
        assert len({text.split("\n\n")[0] for text in texts}) == 1, "the line about the subject stays first"
    arc = load_questions("arc_easy", args)
    assert [some[0] for some in vary_prompts("arc_easy", arc, 3, find, 0)] == [
        "Question: What melts?\nAnswer:",
        "Q: What melts?\nA:",
        "What melts?\nThe answer is:",
    ]


def test_first_prompt_is_the_evaluations(tiny, data, tmp_path, run):
    common = ("--ckpt", tiny, "--tasks", "mmlu", "arc_easy", "--data-dir", data)
    out = tmp_path / "o.jsonl"
    code, printed, err = run("variants.self_ensembling", *common, "--prompts", 3, "--out", out)
    assert code == 0, err
    assert "mmlu, 5 questions" in printed and "ensemble, vote" in printed and "eval.py --ckpt" in printed
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert len(lines) == 6 and all(len(line["probabilities"]) == 3 for line in lines)
    code, _, err = run("eval", *common, "--protocol", "loglik", "--out", tmp_path / "eval")
    assert code == 0, err
    (results,) = json.loads((tmp_path / "eval/results.json").read_text()).values()
    for task in "mmlu", "arc_easy":
        mine = [line for line in lines if line["task"] == task]
        answers = [line["labels"].index(line["answer"]) for line in mine]
        found = score([torch.tensor(line["probabilities"][0]) for line in mine], answers)
        assert found["accuracy"] == pytest.approx(results[task]["score"])
        assert found["ece"] == pytest.approx(results[task]["calibration"]["ece"], abs=1e-4)


def test_refusals(tiny, data, tmp_path, refused):
    out = tmp_path / "o"
    call = lambda *more: ("variants.self_ensembling", "--ckpt", tiny, "--data-dir", data, "--out", out, *more)
    refused(["perplexity", "mmlu"], *call("--tasks", "perplexity"))
    refused(["--prompts 6", "5"], *call("--tasks", "arc_easy", "--prompts", 6))
    refused("--prompts", *call("--tasks", "mmlu", "--prompts", 1))
    refused("nowhere", *call("--tasks", "mmlu", "--ckpt", tmp_path / "nowhere"))
    assert not out.exists()
    out.write_text("mine")
    refused("not written by this command", *call("--tasks", "mmlu"))
