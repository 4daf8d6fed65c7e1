"""curation/local.py: a local checkpoint as teacher, its perplexities, several ranks."""

import json
import math

import pytest
import torch
from mock_endpoint import constant_model, user
from training_runs import launch

from core.checkpoint import Checkpoint
from curation.local import load, perplexities
from curation.teacher import ask_model, open_replies, open_teacher


def test_local_checkpoint(tmp_path):
    source = constant_model(tmp_path / "ckpt")
    teacher = open_teacher(source)
    assert teacher.name == "ckpt" and Checkpoint(source).fingerprint() in teacher.identity
    with open_replies(tmp_path / "r.jsonl") as log:
        prompts = [user("a"), user("b" * 5000), user("ccc")]
        replies = ask_model(teacher, prompts, log, max_tokens=4)
        assert replies[0] == replies[2] == {"text": "7", "finish_reason": "stop"}
        assert "leaves no room" in replies[1]["error"], "what does not fit is set aside and stops nothing"
        again = open_teacher(source)
        assert ask_model(again, [prompts[0], prompts[2]], log, max_tokens=4) == [replies[0], replies[2]]
        assert again.loaded is None, "all replies are cached: the weights are not even read"
        cut = ask_model(teacher, [user("a")], log, max_tokens=1)
        assert cut[0]["finish_reason"] == "length"
        other = open_teacher(constant_model(tmp_path / "ckpt2", reply="42"))
        assert ask_model(other, [user("a")], log, max_tokens=4)[0]["text"] == "42", "other weights, another key"


def test_sampled_replies_do_not_depend_on_a_restart(tiny, tmp_path):
    """Killed after any number of replies, the run ends with the same ones: their random numbers hang on their keys."""
    prompts = [user(f"q{i}") for i in range(10)]
    options = {"max_tokens": 6, "temperature": 1.0, "seed": 3}
    with open_replies(tmp_path / "a.jsonl") as log:
        want = ask_model(open_teacher(tiny), prompts, log, **options)
        assert len({r["text"] for r in want}) > 5, "they do differ"
        assert ask_model(open_teacher(tiny), prompts, log, max_tokens=6, temperature=1.0, seed=4) != want
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)[:10]
    for left in (1, 6):
        path = tmp_path / f"{left}.jsonl"
        path.write_text("".join(lines[:left]))
        with open_replies(path) as log:
            assert ask_model(open_teacher(tiny), prompts, log, **options) == want
        assert sorted(path.read_text().splitlines()) == sorted("".join(lines).splitlines()), "each kept once"


RANKS = """
import json, sys
from core.files import cli
from curation import local
from curation.teacher import ask_model, open_replies, open_teacher
def main():
    local.BLOCK = 2
    if local.join_other_ranks() > 0:
        return local.serve_jobs()
    user = lambda text: [{"role": "user", "content": text}]
    with open_replies(sys.argv[2]) as log:
        teacher = open_teacher(sys.argv[1])
        replies = [ask_model(teacher, [user(f"q{i}" * (i + 1)) for i in range(7)], log, max_tokens=5, **more)
                   for more in ({}, {"temperature": 1.0})]
    pairs = [(user(f"q{i // 2}"), "and so on " * (1 + i % 5)) for i in range(9)]
    perplexities = [local.perplexities(teacher, some, 300, 400) for some in (pairs, pairs[:1], [])]
    local.end_other_ranks()
    print(json.dumps([replies, perplexities]))
"""


def test_ranks_share_the_questions_of_a_local_checkpoint(tiny, tmp_path, monkeypatch):
    (tmp_path / "ranks.py").write_text(RANKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    codes, texts = launch("ranks", (tiny, tmp_path / "two.jsonl"), tmp_path / "text", 2)
    assert codes == [0, 0], texts
    with open_replies(tmp_path / "one.jsonl") as log:
        alone = [
            ask_model(open_teacher(tiny), [user(f"q{i}" * (i + 1)) for i in range(7)], log, max_tokens=5, **more)
            for more in ({}, {"temperature": 1.0})
        ]
    replies, scores = json.loads(texts[0].splitlines()[-1])
    assert replies == alone
    assert sorted((tmp_path / "two.jsonl").read_text().splitlines()) == sorted(
        (tmp_path / "one.jsonl").read_text().splitlines()
    )
    pairs = [(user(f"q{i // 2}"), "and so on " * (1 + i % 5)) for i in range(9)]
    want = perplexities(open_teacher(tiny), pairs, 300, 400)
    assert scores[0] == pytest.approx(want, rel=1e-4) and len(set(want)) == 9, "each in its place"
    assert scores[1] == pytest.approx(want[:1], rel=1e-4) and scores[2] == []


def test_perplexity_equals_the_models_own_probabilities(tmp_path):
    scorer = open_teacher(constant_model(tmp_path / "c", "7"))
    m, tok = load(scorer)
    conversation = [*user("q"), {"role": "assistant", "content": "7"}]
    ids, supervised = tok.chat_ids(conversation)
    logp = m(torch.tensor([ids])).detach().log_softmax(-1)[0]
    mine = [logp[t - 1, ids[t]].item() for t in range(len(ids)) if supervised[t]]
    assert len(mine) == 3, "the reply, <|im_end|>, newline"
    got = perplexities(scorer, [(user("q"), "7"), (user("q" * 50), "7"), (user("q"), "wrong")], 70, 4096)
    assert got[0] == pytest.approx(math.exp(-sum(mine) / 3), rel=1e-3)
    assert got[1] is None, "a prompt that fills max_len leaves nothing to score"
    assert got[2] > got[0]
