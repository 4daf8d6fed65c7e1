"""teacher.py against a real HTTP server on loopback that misbehaves on request, and against a local checkpoint."""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT

from core.chat_template import CHATML_DEFAULT_SYSTEM
from core.checkpoint import Checkpoint
from core.files import InputError
from curation import teacher as models
from model import Qwen2

KEY = "sk-test-5up3r-s3cr3t"


def user(text):
    return [{"role": "user", "content": text}]


@contextlib.contextmanager
def serve(answer, faults=None):
    """A server on loopback whose replies are answer(messages). faults(n, messages) may name a fault for the n-th POST (from
    0): a status, (status, headers), "drop", "hang" (no answer at all), "garbage", "cut", "filtered", "no usage". Yields an object
    with .url, .seen (the messages of the requests that got an answer), .posts (all of them) and .headers (of the last)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def send(self, status, data, headers=()):
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                n, server.posts = server.posts, server.posts + 1
                server.headers, server.body = dict(self.headers), body
                server.active += 1
                server.peak = max(server.peak, server.active)
            try:
                self.answer(body, faults(n, body["messages"]) if faults else None)
            finally:
                with server.lock:
                    server.active -= 1

        def answer(self, body, fault):
            if fault == "hang":
                server.over.wait()
            if fault in ("drop", "hang"):
                self.close_connection = True
                return self.connection.close()
            if fault == "garbage":
                return self.send(200, b"<html>busy</html>")
            if isinstance(fault, int):
                fault = (fault, ())
            if isinstance(fault, tuple):
                return self.send(fault[0], json.dumps({"error": {"message": f"no, {KEY}"}}).encode(), fault[1])
            with server.lock:
                server.seen.append(body["messages"])
            choice = {"index": 0, "message": {"role": "assistant", "content": answer(body["messages"])},
                      "finish_reason": {"cut": "length", "filtered": "content_filter"}.get(fault, "stop")}  # fmt: skip
            usage = (
                {}
                if fault == "no usage"
                else {"usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}
            )
            self.send(200, json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                                       **usage}).encode())  # fmt: skip

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

        def handle_error(self, request, client_address):
            pass  # a client that gave up waiting

    server = Server(("127.0.0.1", 0), Handler)
    server.over = threading.Event()
    server.lock, server.posts, server.seen, server.headers, server.active, server.peak = (
        threading.Lock(),
        0,
        [],
        {},
        0,
        0,
    )
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def constant_model(path, reply="7"):
    """A checkpoint that answers everything with `reply`: attention and MLP are silent, and the head maps each token of the
    chain newline -> reply -> <|im_end|> to the next."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tk

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(tk.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    start, end = tok.token_to_id("<|im_start|>"), tok.token_to_id("<|im_end|>")
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 258, "hidden_size": 258,
              "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
              "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 4096,
              "hidden_act": "silu", "eos_token_id": end}  # fmt: skip
    m = Qwen2(config)
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
        m.model["embed_tokens"].weight.copy_(torch.eye(258))
        m.model["norm"].weight.fill_(1.0)
        chain = [*tok.encode("\n" + reply).ids, end]
        for a, b in zip(chain, chain[1:]):
            m.lm_head.weight[b, a] = 2.0
    template = CHATML_DEFAULT_SYSTEM.replace("DEFAULT", "You are a helpful assistant.")
    m.save(str(path), {"tokenizer.json": tok.to_str(), "tokenizer_config.json": json.dumps({"chat_template": template}),
                       "generation_config.json": json.dumps({"eos_token_id": [end, start]})})  # fmt: skip
    return str(path)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("TEACHER_API_KEY", "OPENAI_API_KEY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(models, "BACKOFF", 0.01)


def echo(messages):
    return "re: " + messages[-1]["content"]


def test_order_concurrency_and_cache(tmp_path):
    path = tmp_path / "replies.jsonl"

    def slow_echo(messages):
        time.sleep(0.02)
        return echo(messages)

    with serve(slow_echo) as server:
        teacher = models.open_teacher(server.url, "some-model")
        prompts = [user(f"q{i % 15}") for i in range(30)]
        with models.open_replies(path) as log:
            replies = models.ask(teacher, prompts, log, concurrency=8, max_tokens=9)
        assert [r["text"] for r in replies] == [f"re: q{i % 15}" for i in range(30)]
        assert server.posts == 15, "equal prompts are asked once"
        assert 4 <= server.peak <= 8, "many in flight, and never more than asked for"
        assert (
            server.body["model"] == "some-model" and server.body["max_tokens"] == 9 and server.body["temperature"] == 0
        )
        with models.open_replies(path) as log:
            assert models.ask(teacher, prompts, log, max_tokens=9) == replies
            assert server.posts == 15, "a second run asks nothing"
            models.ask(teacher, prompts[:1], log, max_tokens=10)
            assert server.posts == 16, "other parameters, another request"
            models.ask(models.open_teacher(server.url, "other-model"), prompts[:1], log, max_tokens=9)
            assert server.posts == 17, "another model, another request"


def test_twenty_percent_faults_cost_only_time(tmp_path, monkeypatch):
    monkeypatch.setattr(
        models, "FIRST_TRIES", 99
    )  # the first answers wait for 64 in flight, and their faults may come thrice
    kinds = ["drop", 500, (429, [("Retry-After", "0")]), "garbage", 503, 502, (503, [("Retry-After", "1")])]

    def faults(n, messages):
        return kinds[(n // 5) % len(kinds)] if n % 5 == 2 else None

    def held(messages):  # until 64 are in flight
        while server.peak < 64 and time.monotonic() < deadline:
            time.sleep(0.01)
        return echo(messages)

    deadline = time.monotonic() + 30
    with serve(held, faults) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        prompts = [user(f"q{i}") for i in range(200)]
        replies = models.ask(models.open_teacher(server.url, "m"), prompts, log, concurrency=64, retries=99)
        assert server.peak == 64 and log.spent == [2000, 1000], "what was charged is what was answered"
        assert [r["text"] for r in replies] == [f"re: q{i}" for i in range(200)]
        assert len(server.seen) == 200, "every request was answered once and paid for once"
        assert server.posts > 230, "the faults did happen"


def test_retry_after_is_honoured(tmp_path):
    at = []

    def faults(n, messages):
        at.append(time.monotonic())
        return (429, [("Retry-After", "1")]) if n == 0 else None

    with serve(echo, faults) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        models.ask(models.open_teacher(server.url, "m"), [user("q")], log)
    assert len(at) == 2 and at[1] - at[0] >= 1.0, "the backoff alone would have been 10 ms"


def test_retry_after_as_a_date():
    class Response:
        status_code, text = 503, "later"
        headers = {"retry-after": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))}

    error = Exception("x")
    error.response = Response
    status, wait, what = models.read_failure(error, models.Teacher("m", "m"))
    assert status == 503 and 25 < wait <= 30 and what == "HTTP 503 later"


def test_a_reply_that_does_not_come_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "FIRST_TRIES", 99)  # on a slow machine the second may come too late as well
    with (
        serve(echo, lambda n, m: "hang" if n == 0 else None) as server,
        models.open_replies(tmp_path / "r.jsonl") as log,
    ):
        replies = models.ask(models.open_teacher(server.url, "m"), [user("q")], log, timeout=1, retries=99)
        assert replies[0]["text"] == "re: q" and server.posts >= 2


def test_400_is_not_retried_and_401_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)

    def faults(n, messages):
        return 400 if messages[-1]["content"] == "bad" else None

    with serve(echo, faults) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        replies = models.ask(models.open_teacher(server.url, "m"), [user("bad"), user("good")], log)
        assert replies[0]["error"].startswith("HTTP 400") and replies[1]["text"] == "re: good"
        assert server.posts == 2
        assert KEY not in replies[0]["error"], "a server that echoes the key does not get it into our files"
    with serve(echo, lambda n, m: 401) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        with pytest.raises(InputError, match="HTTP 401.*TEACHER_API_KEY") as e:
            models.ask(models.open_teacher(server.url, "m"), [user("a")], log)
        assert server.posts == 1 and KEY not in str(e.value)


def test_every_request_refused_is_an_error(tmp_path):
    with serve(echo, lambda n, m: 400) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        with pytest.raises(InputError, match="refused every request: HTTP 400"):
            models.ask(models.open_teacher(server.url, "m"), [user("a"), user("b")], log)


def test_a_request_without_an_answer_ends_the_run_after_the_others(tmp_path):
    """A passing outage: no record is lost for it, and what was answered is not asked again."""
    prompts = [user("poison"), *(user(f"q{i}") for i in range(30)), user("bad")]
    faults = {"poison": 503, "bad": 400}
    with (
        serve(echo, lambda n, m: faults.get(m[-1]["content"])) as server,
        models.open_replies(tmp_path / "r.jsonl") as log,
    ):
        teacher = models.open_teacher(server.url, "m")
        with pytest.raises(
            InputError, match=r": 1 request got no answer after 4 tries \(last: HTTP 503.*is kept: run the same command"
        ) as e:
            models.ask(teacher, prompts, log, concurrency=2, retries=3)
        assert server.posts == 4 + 30 + 1 and len(log) == 30 and "\n" not in str(e.value)
        del faults["poison"]
        replies = models.ask(teacher, prompts, log, concurrency=2, retries=3)
        assert [r["text"] for r in replies[:-1]] == [f"re: {m[-1]['content']}" for m in prompts[:-1]]
        assert replies[-1]["error"].startswith("HTTP 400") and server.posts == 35 + 2, "what is refused stays refused"


def test_unreachable_teacher(tmp_path):
    with serve(echo) as server:
        url = server.url
    with models.open_replies(tmp_path / "r.jsonl") as log, pytest.raises(InputError) as e:
        models.ask(models.open_teacher(url, "m"), [user(f"q{i}") for i in range(20)], log, concurrency=4)
    assert url in str(e.value) and "\n" not in str(e.value)


def test_teacher_that_dies_keeps_what_it_answered(tmp_path):
    path = tmp_path / "r.jsonl"
    with serve(echo, lambda n, m: "drop" if n >= 10 else None) as server:
        with models.open_replies(path) as log, pytest.raises(InputError, match="run the same command"):
            models.ask(
                models.open_teacher(server.url, "m"),
                [user(f"q{i}") for i in range(20)],
                log,
                concurrency=3,
                retries=2,
            )
    assert len(path.read_text().splitlines()) == 10
    with serve(echo) as server, models.open_replies(path) as log:  # another port, the same model
        replies = models.ask(models.open_teacher(server.url, "m"), [user(f"q{i}") for i in range(20)], log)
        assert [r["text"] for r in replies] == [f"re: q{i}" for i in range(20)] and server.posts == 10


def test_cut_off_empty_and_missing_content(tmp_path):
    with serve(lambda m: {"cut": "half a", "none": None}[m[-1]["content"]],
               lambda n, m: "cut" if m[-1]["content"] == "cut" else None) as server, \
            models.open_replies(tmp_path / "r.jsonl") as log:  # fmt: skip
        replies = models.ask(models.open_teacher(server.url, "m"), [user("cut"), user("none")], log)
        assert replies == [{"text": "half a", "finish_reason": "length"}, {"text": "", "finish_reason": "stop"}]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    with serve(lambda m: "half \ud83d") as server, models.open_replies(tmp_path / "r.jsonl") as log:
        assert models.ask(models.open_teacher(server.url, "m"), [user("q")], log)[0]["text"] == "half ?"


def test_a_reply_held_back_is_told_apart(tmp_path):
    with (
        serve(lambda m: "I cannot", lambda n, m: "filtered") as server,
        models.open_replies(tmp_path / "r.jsonl") as log,
    ):
        assert (
            models.ask(models.open_teacher(server.url, "m"), [user("q")], log)[0]["finish_reason"] == "content_filter"
        )
    choice = type("C", (), {"message": type("M", (), {"content": None, "refusal": "no"}), "finish_reason": "stop"})
    assert models.read_output(type("O", (), {"choices": [choice]}), user("q"))[:2] == ("", "content_filter")


# ---- what it costs


@pytest.mark.parametrize("rates", [{"requests_per_minute": 2400}, {"tokens_per_minute": 15 * 2400}])
def test_rates_are_kept_to(tmp_path, rates):
    at = []

    def faults(n, messages):
        at.append(time.monotonic())
        return 500 if n == 4 else None

    with serve(echo, faults) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        models.ask(
            models.open_teacher(server.url, "m"),
            [user(f"q{i}") for i in range(40)],
            log,
            concurrency=40,
            max_tokens=9,
            **rates,
        )
        assert server.posts == 41
    # 40 gaps of 25 ms; a retry is a request too; tokens are first guessed as 5 + 9, then known to be 15
    assert at[-1] - at[0] > 0.85 * 40 * 0.025


def test_a_budget_is_never_exceeded_and_the_run_goes_on_with_a_greater_one(tmp_path):
    path = tmp_path / "r.jsonl"
    prompts = [user(f"q{i}") for i in range(30)]
    with serve(echo) as server:
        teacher = models.open_teacher(server.url, "m")
        with (
            models.open_replies(path) as log,
            pytest.raises(InputError, match=r"the budget of 200 is used up \(195 spent\); raise --budget"),
        ):
            models.ask(teacher, prompts, log, concurrency=8, max_tokens=10, budget=200)  # a reply costs 15
        assert server.posts == 13, "all that the budget bears, though 8 in flight might have taken more"
        with models.open_replies(path) as log:
            assert log.spent == [130, 65], "what was spent is known after a restart"
            prices = (100_000.0, 400_000.0)  # 10 * 0.1 + 5 * 0.4 = 3 a reply
            assert models.price(log.spent, prices) == 39.0
            with pytest.raises(
                InputError, match=r"the budget of 60 is used up \(5[47] spent\)"
            ):  # 6 + 10 tokens may cost 4.6
                models.ask(teacher, prompts, log, concurrency=8, max_tokens=10, budget=60, prices=prices)
            replies = models.ask(teacher, prompts, log, concurrency=8, max_tokens=10, budget=95, prices=prices)
        assert [r["text"] for r in replies] == [f"re: q{i}" for i in range(30)] and server.posts == 30


def test_usage_is_guessed_where_it_is_not_told(tmp_path):
    with serve(lambda m: "x" * 30, lambda n, m: "no usage") as server, models.open_replies(tmp_path / "r.jsonl") as log:
        models.ask(models.open_teacher(server.url, "m"), [user("y" * 29)], log)
        assert log.spent == [29 // 3 + 1 + 4, 30 // 3 + 1]


def test_key_reaches_the_server_and_nothing_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(echo) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        teacher = models.open_teacher(server.url, "m")
        models.ask(teacher, [user("q")], log)
        assert {k.lower(): v for k, v in server.headers.items()}["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(teacher) and KEY not in (tmp_path / "r.jsonl").read_text()
    assert KEY not in "".join(capfd.readouterr())


def test_a_malformed_key_is_not_quoted(tmp_path, monkeypatch):
    """The HTTP library names an illegal header value in its error, with escapes that no search for the key would find."""
    monkeypatch.setenv("TEACHER_API_KEY", f" {KEY}\r\n")
    with serve(echo) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        models.ask(models.open_teacher(server.url, "m"), [user("q")], log)
        assert {k.lower(): v for k, v in server.headers.items()}["authorization"] == f"Bearer {KEY}", (
            "its end was cut off with care"
        )
    for bad in (f"{KEY}\n{KEY}", f"{KEY}\x00", f"{KEY}\u00e9"):
        monkeypatch.setenv("TEACHER_API_KEY", bad) if "\0" not in bad else monkeypatch.setattr(
            os, "environ", {"TEACHER_API_KEY": bad}
        )
        with pytest.raises(InputError, match="holds a character") as e:
            models.open_teacher("http://localhost:1/v1")
        assert KEY not in str(e.value)


def test_the_hub_token_is_not_sent_to_a_foreign_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    with serve(echo) as server, models.open_replies(tmp_path / "r.jsonl") as log:
        models.ask(models.open_teacher(server.url, "m"), [user("q")], log)
        assert "authorization" not in {k.lower() for k in server.headers}


def test_bad_urls():
    with pytest.raises(InputError, match="no host"):
        models.open_teacher("http://")
    with pytest.raises(InputError, match="TEACHER_API_KEY") as e:
        models.open_teacher(f"https://me:{KEY}@host/v1")
    assert KEY not in str(e.value)


def test_torn_last_line_is_cut_off_and_damage_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    teacher = models.Teacher("m", "m", url="http://nowhere")
    keys = [models.reply_key(teacher, user(t), {}) for t in "abc"]
    with models.open_replies(path) as log:
        for key, text in zip(keys, ("1", "zwei \u00e4 \u4e8c", "3")):
            models.keep_reply(log, key, teacher, text, "stop")
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with models.open_replies(path) as log:
        assert set(log) == set(keys[:2])
        assert models.read_reply(log[keys[1]]) == {"text": "zwei \u00e4 \u4e8c", "finish_reason": "stop"}
        models.keep_reply(log, keys[2], teacher, "3", "stop")
    assert path.read_bytes() == whole
    path.write_bytes(b'{"key": 1}\n' + whole)
    with pytest.raises(InputError, match="r.jsonl:1: not a kept reply"), models.open_replies(path):
        pass


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with models.open_replies(tmp_path / "r.jsonl"):
        with pytest.raises(InputError, match="another run"), models.open_replies(tmp_path / "r.jsonl"):
            pass


def test_local_checkpoint(tmp_path):
    source = constant_model(tmp_path / "ckpt")
    teacher = models.open_teacher(source)
    assert teacher.name == "ckpt" and Checkpoint(source).fingerprint() in teacher.identity
    with models.open_replies(tmp_path / "r.jsonl") as log:
        prompts = [user("a"), user("b" * 5000), user("ccc")]
        replies = models.ask(teacher, prompts, log, max_tokens=4)
        assert replies[0] == replies[2] == {"text": "7", "finish_reason": "stop"}
        assert "leaves no room" in replies[1]["error"], "what does not fit is set aside and stops nothing"
        again = models.open_teacher(source)
        assert models.ask(again, [prompts[0], prompts[2]], log, max_tokens=4) == [replies[0], replies[2]]
        assert again.loaded is None, "all replies are cached: the weights are not even read"
        cut = models.ask(teacher, [user("a")], log, max_tokens=1)
        assert cut[0]["finish_reason"] == "length"
        other = models.open_teacher(constant_model(tmp_path / "ckpt2", reply="42"))
        assert models.ask(other, [user("a")], log, max_tokens=4)[0]["text"] == "42", "other weights, another key"


def test_sampled_replies_do_not_depend_on_a_restart(tiny, tmp_path):
    """Killed after any number of replies, the run ends with the same ones: their random numbers hang on their keys."""
    prompts = [user(f"q{i}") for i in range(10)]
    options = {"max_tokens": 6, "temperature": 1.0, "seed": 3}
    with models.open_replies(tmp_path / "a.jsonl") as log:
        want = models.ask(models.open_teacher(tiny), prompts, log, **options)
        assert len({r["text"] for r in want}) > 5, "they do differ"
        assert models.ask(models.open_teacher(tiny), prompts, log, max_tokens=6, temperature=1.0, seed=4) != want
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)[:10]
    for left in (1, 6):
        path = tmp_path / f"{left}.jsonl"
        path.write_text("".join(lines[:left]))
        with models.open_replies(path) as log:
            assert models.ask(models.open_teacher(tiny), prompts, log, **options) == want
        assert sorted(path.read_text().splitlines()) == sorted("".join(lines).splitlines()), "each kept once"


RANKS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from curation import teacher as models
models.BLOCK = 2
if models.join_ranks() > 0:
    models.serve_rank()
else:
    user = lambda text: [{"role": "user", "content": text}]
    with models.open_replies(sys.argv[3]) as log:
        teacher = models.open_teacher(sys.argv[2])
        replies = [models.ask(teacher, [user(f"q{i}" * (i + 1)) for i in range(7)], log, max_tokens=5, **more)
                   for more in ({}, {"temperature": 1.0})]
    pairs = [(user(f"q{i // 2}"), "and so on " * (1 + i % 5)) for i in range(9)]
    perplexities = [models.perplexities(teacher, some, 300, 400) for some in (pairs, pairs[:1], [])]
    models.leave_ranks()
    print(json.dumps([replies, perplexities]))
"""


def test_ranks_share_the_questions_of_a_local_checkpoint(tiny, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
               "127.0.0.1:0", str(tmp_path / "ranks.py"), ROOT, tiny, str(tmp_path / "two.jsonl")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[:4000]  # a rank's own words come before torchrun's
    with models.open_replies(tmp_path / "one.jsonl") as log:
        alone = [models.ask(models.open_teacher(tiny), [user(f"q{i}" * (i + 1)) for i in range(7)], log, max_tokens=5, **more)
                 for more in ({}, {"temperature": 1.0})]  # fmt: skip
    replies, perplexities = json.loads(done.stdout)
    assert replies == alone
    assert sorted((tmp_path / "two.jsonl").read_text().splitlines()) == sorted(
        (tmp_path / "one.jsonl").read_text().splitlines()
    )
    pairs = [(user(f"q{i // 2}"), "and so on " * (1 + i % 5)) for i in range(9)]
    want = models.perplexities(models.open_teacher(tiny), pairs, 300, 400)
    assert perplexities[0] == pytest.approx(want, rel=1e-4) and len(set(want)) == 9, "each in its place"
    assert perplexities[1] == pytest.approx(want[:1], rel=1e-4) and perplexities[2] == []


def test_perplexity_equals_the_models_own_probabilities(tmp_path):
    scorer = models.open_teacher(constant_model(tmp_path / "c", "7"))
    m, tok = models.load(scorer)
    conversation = [*user("q"), {"role": "assistant", "content": "7"}]
    ids, supervised = tok.chat_ids(conversation)
    logp = m(torch.tensor([ids])).detach().log_softmax(-1)[0]
    mine = [logp[t - 1, ids[t]].item() for t in range(len(ids)) if supervised[t]]
    assert len(mine) == 3, "the reply, <|im_end|>, newline"
    got = models.perplexities(scorer, [(user("q"), "7"), (user("q" * 50), "7"), (user("q"), "wrong")], 70, 4096)
    assert got[0] == pytest.approx(math.exp(-sum(mine) / 3), rel=1e-3)
    assert got[1] is None, "a prompt that fills max_len leaves nothing to score"
    assert got[2] > got[0]
