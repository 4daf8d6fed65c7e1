"""Token weights: TL-Training's numbers by hand, weights of 1 are SFT, weights of 0 train nothing, bad input, runs."""

import json

import pytest
import torch
from conftest import write_lines
from training_runs import chats, log, update_error, weights
from variant_runs import arguments, check_runs, check_shard

from core.checkpoint import Checkpoint
from core.tokenizer import Tokenizer
from variants.token_weights import call_weights, closing_tokens, key_tokens, rule_weights, weighted_loss

SEARCH, ADV, ICE, DOC, GET = range(5)


def weighted(records, tiny, weight):
    """The records with token_weights: weight(k) for supervised token k."""
    tokenizer = Tokenizer(Checkpoint(tiny))
    count = lambda record: sum(tokenizer.chat_ids(record["messages"])[1])
    return [record | {"token_weights": [weight(k) for k in range(count(record))]} for record in records]


def test_loss_by_hand():
    assert key_tokens([SEARCH, ADV, ICE], [[SEARCH, DOC], [GET]]) == {0, 1}
    w = rule_weights(9, {0, 1}, {5})
    assert w == [3, 3, 1, 1, 1, 1, 1, 1, 1]
    nll = torch.tensor([1.0, 0.5, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1])
    assert weighted_loss(-nll, torch.tensor(w), sum(w)).item() == pytest.approx(0.40769, abs=1e-5)
    assert weighted_loss(-nll, torch.ones(9), 9).item() == pytest.approx(nll.mean().item())


def test_key_tokens_where_one_name_is_the_beginning_of_another():
    assert key_tokens([GET], [[GET, DOC]]) == {0, 1}  # the bracket after the name decides
    assert key_tokens([GET, DOC], [[GET]]) == {0, 1}
    assert key_tokens([GET, DOC], []) == {0}


def test_the_weight_is_clipped():
    assert rule_weights(40, {0}, set())[:2] == [9, 1]
    assert rule_weights(3, {0, 1}, set()) == [1, 1, 1]


def test_closing_tokens_follow_a_value():
    assert closing_tokens(["get", "(", "a", "=", '"', "x", '"', ",", " b", "=[", "1", "])"]) == {6, 11}


def test_weights_of_a_call(tiny):
    tokenizer = Tokenizer(Checkpoint(tiny))
    reply = "add(1, 2)"
    ids = tokenizer.completion_ids(reply)
    got = call_weights(reply, ["add", "return"], tokenizer, "file:1")
    assert len(got) == len(ids) and got[0] > 1 and set(got[1:]) == {1.0}


def test_runs(tiny, tmp_path, run, monkeypatch):
    data = write_lines(tmp_path / "d.jsonl", weighted(chats(13), tiny, lambda k: 1 + k % 3))
    whole = check_runs(run, monkeypatch, "variants.token_weights", tiny, data, tmp_path)
    check_shard("variants.token_weights", tiny, data, tmp_path, whole)


def test_weights_of_1_are_sft_and_weights_of_0_do_not_train(tiny, tmp_path, run):
    plain, ones, half = (tmp_path / name for name in ("plain", "ones", "half"))
    records = chats(13)
    data = [write_lines(tmp_path / "d.jsonl", records)]
    data += [write_lines(tmp_path / f"d{w}.jsonl", weighted(records, tiny, lambda k: w)) for w in (1, 5)]
    data += [write_lines(tmp_path / "first.jsonl", weighted(records, tiny, lambda k: int(k == 0)))]
    assert run("train_sft", *arguments(tiny, data[0], plain))[0] == 0
    assert run("variants.token_weights", *arguments(tiny, data[1], ones))[0] == 0
    assert run("variants.token_weights", *arguments(tiny, data[2], tmp_path / "fives"))[0] == 0
    assert run("variants.token_weights", *arguments(tiny, data[3], half))[0] == 0
    assert [s["loss"] for s in log(ones)] == pytest.approx([s["loss"] for s in log(plain)], rel=1e-5)
    assert update_error(weights(ones), weights(plain), weights(tiny)) < 1e-3
    assert update_error(weights(tmp_path / "fives"), weights(plain), weights(tiny)) < 1e-3
    assert update_error(weights(half), weights(plain), weights(tiny)) > 0.1


def test_tool_names_train_the_last_reply_alone(tiny, tmp_path, run):
    turn = lambda text: [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
    both = {"messages": turn("print(4)") + turn("add(1, 2)"), "tool_names": ["add", "print"]}
    last = {"messages": [m | {"weight": 0} for m in both["messages"][:2]] + both["messages"][2:]}
    names = ["add", "print"]
    explicit = last | {"token_weights": call_weights("add(1, 2)", names, Tokenizer(Checkpoint(tiny)), "file:1")}
    losses = []
    for record in both, explicit:
        data, out = write_lines(tmp_path / "d.jsonl", [record] * 4), tmp_path / f"o{len(losses)}"
        assert run("variants.token_weights", *arguments(tiny, data, out))[0] == 0
        losses.append([s["loss"] for s in log(out)])
    assert losses[0] == pytest.approx(losses[1])


def test_resume_refuses_other_weights(tiny, tmp_path, run, refused):
    data, out = str(tmp_path / "d.jsonl"), tmp_path / "o"
    call = lambda *more: ("variants.token_weights", *arguments(tiny, data, out, "--save-every", 1, *more))
    write_lines(data, weighted(chats(8), tiny, lambda k: 1))
    assert run(*call())[0] == 0
    state = json.loads((tmp_path / "o.run" / "state.json").read_text())
    (tmp_path / "o.run" / "state.json").write_text(json.dumps(state | {"finished": False}))
    write_lines(data, weighted(chats(8), tiny, lambda k: 1 + k))
    refused("weights", *call("--resume"))


def test_bad_input_ends_in_one_line(tiny, tmp_path, refused):
    (good,) = weighted(chats(1), tiny, lambda k: 1)
    n, call = len(good["token_weights"]), {"prompt": "x", "completion": "add(1)"}
    for words, record in (
        (["d.jsonl:2", "token_weights or tool_names"], chats(1)[0]),
        ([f"{n - 1} token_weights for {n}"], good | {"token_weights": [1] * (n - 1)}),
        ([f"{n + 1} token_weights for {n}"], good | {"token_weights": [1] * (n + 1)}),
        ("at least 0", good | {"token_weights": [-1] * n}),
        ("at least 0", good | {"token_weights": [True] * n}),
        ("at least 0", good | {"token_weights": "1"}),
        ("at least 0", good | {"token_weights": [float("nan")] * n}),
        ("has a weight above 0", good | {"token_weights": [0] * n}),
        ("not both", good | {"tool_names": ["add"]}),
        ("list of texts", call | {"tool_names": "add"}),
        ("does not call", call | {"tool_names": ["print"]}),
        ("does not call", call | {"tool_names": []}),
        ("does not call", call | {"completion": "add", "tool_names": ["add"]}),
    ):
        data = write_lines(tmp_path / "d.jsonl", [good, record])
        refused(words, "variants.token_weights", *arguments(tiny, data, tmp_path / "o"))
    assert not (tmp_path / "o").exists()
