"""A chat endpoint on loopback that misbehaves on request, and a checkpoint that always gives the same answer."""

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from core.chat_template import CHATML_DEFAULT_SYSTEM
from curation import workers
from model import Qwen2

KEY = "sk-test-5up3r-s3cr3t"


def user(text):
    return [{"role": "user", "content": text}]


@contextlib.contextmanager
def closed_port():
    """Yields a URL on loopback that refuses every connection: nobody else can take its port meanwhile."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}/v1"


@contextlib.contextmanager
def serve(answer, faults=None):
    """A server on loopback whose replies are answer(messages). faults(n, messages) may name a fault for the n-th POST (from
    0): a status, (status, headers), "drop", "hang" (no answer at all), "garbage", "cut", "filtered", "no usage", or the
    bytes of an HTTP 200. Yields an object
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
            if isinstance(fault, bytes):
                return self.send(200, fault)
            if isinstance(fault, int):
                fault = (fault, ())
            if isinstance(fault, tuple):
                return self.send(fault[0], json.dumps({"error": {"message": f"no, {KEY}"}}).encode(), fault[1])
            with server.lock:
                server.seen.append(body["messages"])
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": answer(body["messages"])},
                "finish_reason": {"cut": "length", "filtered": "content_filter"}.get(fault, "stop"),
            }
            usage = (
                {}
                if fault == "no usage"
                else {"usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}
            )
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], **usage}
            self.send(200, json.dumps(reply).encode())

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
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 258,
        "hidden_size": 258,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "eos_token_id": end,
    }
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
    m.save(
        str(path),
        {
            "tokenizer.json": tok.to_str(),
            "tokenizer_config.json": json.dumps({"chat_template": template}),
            "generation_config.json": json.dumps({"eos_token_id": [end, start]}),
        },
    )
    return str(path)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (
        "TEACHER_API_KEY",
        "OPENAI_API_KEY",
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "https_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(workers, "BACKOFF", 0.01)


def echo(messages):
    return "re: " + messages[-1]["content"]
