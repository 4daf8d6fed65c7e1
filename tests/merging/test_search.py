"""The search of merge.py: the search on functions with known answers, and its scores against merging, writing and measuring."""

import json
import os
import shlex

import pytest
import torch
from conftest import tiny_files, tiny_model, write_lines

from core.checkpoint import Checkpoint
from core.conversations import sft_conversations
from core.records import read_records
from core.tokenizer import Tokenizer
from merge import merge_checkpoints
from merging import minimise, search
from merging.flags import parse_search_args
from merging.inputs import open_inputs
from model import Qwen2
from training.examples import count_supervised, encode_chats
from training.logps import sequence_logps


def find(f, over=("weights",), n=2, budget=15):
    """-> (the best point, the values of all points tried)."""
    tried = {}
    start = {"weights": [1 / n] * n, **{name: 1.0 for name in over if name != "weights"}}
    evaluate = lambda point, label: tried.setdefault(str(point), f(point))
    best = minimise.minimise(evaluate, lambda point: str(point) in tried, start, over, n, budget)
    assert f(best) == min(tried.values()) and len(tried) <= budget
    return best, tried


@pytest.mark.parametrize("least", [0.03, 0.2, 0.5, 0.77, 1.0])
def test_a_parabola_is_found_in_six_points(least):
    best, tried = find(lambda p: 3 + 2 * (p["weights"][1] - least) ** 2)
    assert best["weights"] == pytest.approx([1 - least, least], abs=0.01) and len(tried) <= 6
    assert {str({"weights": w}) for w in ([0.5, 0.5], [0.0, 1.0], [1.0, 0.0])} <= set(tried)


def test_a_kink_and_a_slope_are_found():
    best, tried = find(lambda p: abs(p["weights"][1] - 0.37))
    assert best["weights"][1] == pytest.approx(0.37, abs=0.04) and len(tried) <= 12
    assert find(lambda p: -p["weights"][1])[0]["weights"] == [0, 1]
    assert find(lambda p: 1.0)[0]["weights"] == [0.5, 0.5]


def test_several_numbers_at_once():
    f = lambda p: (p["weights"][1] - 0.1) ** 2 + (p["lambda"] - 2.3) ** 2 + (p["density"] - 0.35) ** 2 / 3
    best, _ = find(f, ("weights", "lambda", "density"), budget=40)
    assert best["weights"][1] == pytest.approx(0.1, abs=0.03)
    assert best["lambda"] == pytest.approx(2.3, abs=0.06) and best["density"] == pytest.approx(0.35, abs=0.03)
    best, _ = find(lambda p: (p["weights"][1] - 0.1) ** 2 + (p["weights"][2] - 0.6) ** 2, n=3, budget=60)
    assert best["weights"] == pytest.approx([0.3, 0.1, 0.6], abs=0.05)
    assert find(lambda p: (p["weights"][0] - 1.7) ** 2, n=1)[0]["weights"] == pytest.approx([1.7], abs=0.02)


def test_the_budget_is_kept():
    for budget in (1, 3, 5, 8):
        f = lambda p: abs(p["weights"][1] - 0.37) + abs(p["weights"][2] - 0.2)
        assert len(find(f, n=3, budget=budget)[1]) == budget


def test_greedy_soup():
    gain = {0: 1.0, 1: -3.0, 2: 2.0}  # what a member adds to the mean, on top of its own
    asked = []

    def evaluate(point, label):
        members = [i for i, w in enumerate(point["weights"]) if w]
        assert {point["weights"][i] for i in members} == {1 / len(members)}
        asked.append(members)
        return -sum(gain[i] for i in members)

    assert minimise.greedy_soup(evaluate, 3) == {"weights": [0.5, 0, 0.5]}
    assert asked == [[0], [1], [2], [0, 2], [0, 1, 2], [0, 1, 2]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories base, a, b of one tiny model, and a file of conversations."""
    folder = tmp_path_factory.mktemp("search")
    for i, name in enumerate(("base", "a", "b")):
        m, g = tiny_model(), torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in m.parameters():
                p += 0.05 * i * torch.randn(p.shape, generator=g)
        m.save(str(folder / name), tiny_files())
    lines = [{"prompt": f"What is {i} + 2?", "completion": f"{i} + 2 = {i + 2}" + "." * (i % 4)} for i in range(12)]
    write_lines(folder / "data.jsonl", lines)
    return folder


def test_scores_are_those_of_the_written_checkpoint(models, run, tmp_path):
    out = tmp_path / "s.json"
    code, said, _ = run(
        "merge",
        "search",
        "--method",
        "ties",
        "--base",
        models / "base",
        "--models",
        models / "a",
        models / "b",
        "--density",
        0.5,
        "--over",
        "weights",
        "lambda",
        "lines",
        "--evaluations",
        9,
        "--data",
        models / "data.jsonl",
        "--aside",
        0.25,
        "--seed",
        3,
        "--out",
        out,
    )
    assert code == 0
    record = json.loads(out.read_text())
    points, final = record["points"], record["final"]
    assert [p["weights"] for p in points[:2]] == [[0.5, 0.5], [0.05, 0.95]] and 2 < len(points) <= 9
    assert {"lambda", "lines", "score", "stderr"} <= set(points[0]) and said.count("loss per token") >= len(points)
    key = lambda p: [p["weights"], p["lambda"], p["lines"]]
    assert key(record["best"]) == key(min(points, key=lambda p: p["score"])) == key(final[0])
    assert [f["weights"] for f in final[-2:]] == [[0.5, 0.5], [0.05, 0.95]]

    words = shlex.split(next(line for line in said.splitlines() if line.startswith("draw:")))[2:]
    assert words[:2] == ["-m", "tools.plot"] and run("tools.plot", *words[2:])[0] == 0 and (tmp_path / "s.png").exists()
    words = shlex.split(next(line for line in said.splitlines() if line.startswith("next:")))[3:]
    assert run("merge", *words[:-1], tmp_path / "fused")[0] == 0  # the command that it prints, with another --out
    m, tokenizer = Qwen2.from_pretrained(str(tmp_path / "fused")), Tokenizer(str(tmp_path / "fused"))
    examples, *_ = encode_chats(read_records([models / "data.jsonl"], sft_conversations), tokenizer, 1024)
    seen, aside = search.split_aside(examples, 0.25, 3)
    assert len(aside) == 3 and len(seen) == 9 and all(e not in seen for e in aside)
    for part, score in ((seen, min(p["score"] for p in points)), (aside, final[0]["score"])):
        loss = -sequence_logps(m, part, 2048).sum().item() / count_supervised(part)
        assert loss == pytest.approx(score, rel=1e-5)
    before = Checkpoint(str(models / "a")).tensor("model.norm.weight")  # the inputs are as they were
    assert torch.isfinite(before).all() and (before != 0).all()


def test_records_that_are_cut_are_counted(models, run, tmp_path):
    records, tokenizer = read_records([models / "data.jsonl"], sft_conversations), Tokenizer(str(models / "a"))
    longest = max(len(ids) for ids, _ in encode_chats(records, tokenizer, 1024)[0])
    _, _, cuts = encode_chats(records, tokenizer, longest - 1)
    argv = ("--method", "linear", "--models", models / "a", models / "b", "--data", models / "data.jsonl")
    more = ("--evaluations", 3, "--max-len", longest - 1, "--out", tmp_path / "s.json")
    code, said, _ = run("merge", "search", *argv, *more)
    lost = f"of 12 held-out examples cut to {longest - 1} tokens (--max-len): {cuts.tokens} tokens lost"
    assert code == 0 and cuts.examples == cuts.tokens > 0 and f"{cuts.examples} {lost}" in said


def test_a_stopped_search_says_that_nothing_is_written(models, run, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "sequence_logps", stop)
    argv = ("--method", "linear", "--models", models / "a", models / "b", "--data", models / "data.jsonl")
    code, _, err = run("merge", "search", *argv, "--out", tmp_path / "s.json")
    assert code == 130 and f"stopped: {tmp_path}/s.json is not written\n" in err and not os.listdir(tmp_path)


def test_by_a_task_and_greedily(models, run, tmp_path):
    (tmp_path / "demo").mkdir()
    write_lines(
        tmp_path / "demo" / "heldout.jsonl",
        [{"id": i, "prompt": f"{i}?", "reference": {"kind": "number", "value": "3"}} for i in range(6)],
    )
    out = tmp_path / "s.json"
    code, said, _ = run(
        "merge",
        "search",
        "--method",
        "linear",
        "--models",
        models / "a",
        models / "b",
        models / "base",
        "--greedy",
        "--tasks",
        "demo",
        "--data-dir",
        tmp_path,
        "--max-new-tokens",
        3,
        "--out",
        out,
    )
    record = json.loads(out.read_text())
    assert code == 0 and record["what"] == "share right" and all(0 <= p["score"] <= 1 for p in record["points"])
    assert [1.0, 0.0, 0.0] in [
        p["weights"] for p in record["points"]
    ] and "next:  python merge.py --method linear" in said


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("give exactly one of them", []),
        ("give exactly one of them", ["--data", "x", "--tasks", "demo"]),
        ("is not below 1", ["--data", "x", "--aside", "1"]),
        ("--over density: has no effect", ["--data", "x", "--over", "density"]),
        ("--weights-for", ["--data", "x", "--weights-for", "x", "1", "1"]),
        ("needs 2", ["--data", "ONE"]),
        ("is not a regular file", ["--data", "x", "--out", "FOLDER"]),
        ("nothing can be written", ["--data", "x", "--out", "ONE/s.json"]),
        ("-s.json begins like a flag; write ./-s.json", ["--data", "x", "--out=-s.json"]),
    ],
)
def test_bad_input(models, refused, tmp_path, words, more):
    one = write_lines(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    more = [word.replace("ONE", str(one)).replace("FOLDER", str(tmp_path)) for word in more]
    refused(
        words,
        "merge",
        "search",
        "--method",
        "linear",
        "--models",
        models / "a",
        models / "b",
        "--out",
        tmp_path / "s.json",
        *more,
    )
    refused(
        "--method must be linear",
        "merge",
        "search",
        "--method",
        "ties",
        "--base",
        models / "base",
        "--models",
        models / "a",
        "--out",
        tmp_path / "s.json",
        "--greedy",
        "--data",
        one,
    )


@pytest.mark.parametrize(
    ("method", "name", "given", "least"),
    [("della", "density", 1.0, 0.97), ("della_linear", "density", 0.3, 0.01), ("expo", "weights", 1.3, 0.8)],
)
def test_only_what_merge_takes_is_tried(models, method, name, given, least):
    """Every point of a search whose best would lie beyond is a setting that merge.py takes."""
    argv = [
        "--method",
        method,
        "--base",
        str(models / "base"),
        "--out",
        "s.json",
        "--data",
        "x",
        "--over",
        name,
        "--models",
    ]
    path, tried = str(models / "a"), []

    def taken(value):
        more = [f"{path}:{value}"] if name == "weights" else [path, "--density", str(value)]
        a = parse_search_args([*argv, *more])
        open_inputs(a)
        return a

    def evaluate(point, label):
        tried.append(point[name] if name == "density" else point[name][0])
        taken(tried[-1])
        return (tried[-1] - least) ** 2

    start = {"weights": [given]} if name == "weights" else {"weights": [1.0], name: given}
    minimise.minimise(evaluate, lambda point: False, start, [name], 1, 12, search.valid_ranges(taken(given), 1))
    assert min(abs(x - least) for x in tried) < 0.23 and len({*tried}) > 2  # as far as the bound


@pytest.mark.parametrize(
    ("weights", "more", "best"),
    [
        (["0.3", "0.9"], ["--over", "density"], [0.3, 0.9]),  # not searched: as they were given
        (["1", "1"], ["--over", "density", "weights", "--evaluations", "3"], [0.05, 0.95]),
        (["0.94", "0.06"], ["--over", "weights", "--evaluations", "3"], [0.05, 0.95]),
        (["1", "1"], ["--method", "linear", "--greedy"], [0.05, 0.95]),
    ],
)
def test_nothing_that_was_tried_is_better_than_the_best(models, run, tmp_path, monkeypatch, weights, more, best):
    far = lambda args: abs(args.weights[1] - 0.95) + abs(args.densities[0] - 1)
    monkeypatch.setattr("merge.merge_checkpoints", lambda args, *more, **settings: args)
    monkeypatch.setattr(search, "merge_into", lambda model, args: setattr(model, "args", args))
    measure = lambda args, model, tokenizer, examples: ([far(model.args)] * len(examples), [1] * len(examples))
    monkeypatch.setattr(search.LOSS, "measure", measure)
    pair = [f"{models / name}:{w}" for name, w in zip("ab", weights)]
    code, said, _ = run(
        "merge",
        "search",
        "--method",
        "ties",
        "--base",
        models / "base",
        "--models",
        *pair,
        "--data",
        models / "data.jsonl",
        "--out",
        tmp_path / "s.json",
        *more,
    )
    record = json.loads((tmp_path / "s.json").read_text())
    assert code == 0 and record["best"]["weights"] == best == record["final"][0]["weights"]
    assert record["final"][0]["score"] == min(p["score"] for p in record["points"])
    assert "weights" in more or "--greedy" in more or all(p["weights"] == best for p in record["points"])


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_the_closing_command_makes_the_best_merge_where_a_weight_is_zero(models, run, tmp_path, method):
    paths, out = [str(models / name) for name in "ab"], tmp_path / "written"
    more = (
        ["--method", method]
        if method == "linear"
        else ["--method", method, "--base", str(models / "base"), "--density", "0.5"]
    )
    a = parse_search_args([*more, "--models", *paths, "--data", "x", "--out", "s.json", "--seed", "4"])
    base, opened = open_inputs(a)
    best = search.args_at(a, {"weights": [0.0, 1.0]})
    want = dict(merge_checkpoints(best, base, opened, torch.float32, quiet=True))
    words = shlex.split(search.merge_command(a, best, opened))[2:]
    assert run("merge", *words[:-1], out)[0] == 0
    assert all(torch.equal(Checkpoint(str(out)).tensor(name), tensor) for name, tensor in want.items())
    assert not {"--normalize", "--no-normalize", "--rescale"} & {*words}  # what the method does anyhow
    other = {
        "linear": "--no-normalize",
        "ties": "--rescale l1 --no-normalize",
        "dare_ties": "--rescale none --normalize",
    }[method]
    a = parse_search_args([*more, *other.split(), "--models", *paths, "--data", "x", "--out", "s.json"])
    open_inputs(a)
    assert f" {other} " in search.merge_command(a, search.args_at(a, {"weights": [0.0, 1.0]}), opened)
