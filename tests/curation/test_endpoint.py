"""curation/endpoint.py: URLs, keys, and what is read out of replies, however malformed."""

import json
import os
import time

import pytest
from mock_endpoint import KEY, echo, environment, serve, user  # noqa: F401  (environment is a fixture)

from core.files import InputError
from curation.endpoint import (
    read_completion,
    read_refusal,
)
from curation.teacher import ask_model, open_replies, open_teacher


def completion(usage=(1, 2), **choice):
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "text"}, "finish_reason": "stop"} | choice
    counts = dict(zip(("prompt_tokens", "completion_tokens"), usage))
    return json.dumps({"choices": [choice], "usage": counts}).encode()


def test_retry_after_as_a_date():
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    failure = read_refusal(503, {"retry-after": later}, b"later")
    assert failure.remedy == "retry" and 25 < failure.wait <= 30 and failure.reason == "HTTP 503: later"


def test_cut_off_empty_and_missing_content(tmp_path):
    with serve(lambda m: {"cut": "half a", "none": None}[m[-1]["content"]],
               lambda n, m: "cut" if m[-1]["content"] == "cut" else None) as server, \
            open_replies(tmp_path / "r.jsonl") as log:  # fmt: skip
        replies = ask_model(open_teacher(server.url, "m"), [user("cut"), user("none")], log)
        assert replies == [
            {"text": "half a", "finish_reason": "length"},
            {"error": "HTTP 200, but the reply has no text"},
        ]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    with serve(lambda m: "half \ud83d") as server, open_replies(tmp_path / "r.jsonl") as log:
        assert ask_model(open_teacher(server.url, "m"), [user("q")], log)[0]["text"] == "half ?"


def test_a_reply_held_back_is_told_apart(tmp_path):
    with (
        serve(lambda m: "I cannot", lambda n, m: "filtered") as server,
        open_replies(tmp_path / "r.jsonl") as log,
    ):
        assert ask_model(open_teacher(server.url, "m"), [user("q")], log)[0]["finish_reason"] == "content_filter"
    reply = completion(message={"content": None, "refusal": "no"})
    assert read_completion(reply)[:2] == ("", "content_filter")


def headers_of(server):
    return {name.lower(): value for name, value in server.headers.items()}


def test_key_reaches_the_server_and_nothing_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    with serve(echo) as server, open_replies(tmp_path / "r.jsonl") as log:
        teacher = open_teacher(server.url, "m")
        ask_model(teacher, [user("q")], log)
        assert headers_of(server)["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(teacher) and KEY not in (tmp_path / "r.jsonl").read_text()
    assert KEY not in "".join(capfd.readouterr())


def test_a_malformed_key_is_not_quoted(tmp_path, monkeypatch):
    """The HTTP library names an illegal header value in its error, with escapes that no search for the key would find."""
    monkeypatch.setenv("TEACHER_API_KEY", f" {KEY}\r\n")
    with serve(echo) as server, open_replies(tmp_path / "r.jsonl") as log:
        ask_model(open_teacher(server.url, "m"), [user("q")], log)
        assert {k.lower(): v for k, v in server.headers.items()}["authorization"] == f"Bearer {KEY}", (
            "its end was cut off with care"
        )
    for bad in (f"{KEY}\n{KEY}", f"{KEY}\x00", f"{KEY}\u00e9"):
        monkeypatch.setenv("TEACHER_API_KEY", bad) if "\0" not in bad else monkeypatch.setattr(
            os, "environ", {"TEACHER_API_KEY": bad}
        )
        with pytest.raises(InputError, match="holds a character") as e:
            open_teacher("http://localhost:1/v1")
        assert KEY not in str(e.value)


def test_the_hub_token_is_not_sent_to_a_foreign_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    with serve(echo) as server, open_replies(tmp_path / "r.jsonl") as log:
        ask_model(open_teacher(server.url, "m"), [user("q")], log)
        assert "authorization" not in {k.lower() for k in server.headers}


def test_bad_urls():
    with pytest.raises(InputError, match="no host"):
        open_teacher("http://")
    with pytest.raises(InputError, match="TEACHER_API_KEY") as e:
        open_teacher(f"https://me:{KEY}@host/v1")
    assert KEY not in str(e.value)
