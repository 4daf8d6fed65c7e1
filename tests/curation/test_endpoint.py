"""curation/endpoint.py: URLs, keys, and what is read out of replies, however malformed."""

import json
import os
import time

import pytest
from mock_endpoint import KEY, echo, environment, serve, user  # noqa: F401  (environment is a fixture)

from core.files import InputError
from curation.endpoint import RequestFailed, mask_key, mask_url, read_completion, read_refusal, retry_after
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
    with (
        serve(
            lambda m: {"cut": "half a", "none": None}[m[-1]["content"]],
            lambda n, m: "cut" if m[-1]["content"] == "cut" else None,
        ) as server,
        open_replies(tmp_path / "r.jsonl") as log,
    ):
        replies = ask_model(open_teacher(server.url, "m"), [user("cut"), user("none")], log)
        assert replies == [
            {"text": "half a", "finish_reason": "length"},
            {"error": "HTTP 200, but the reply has no text"},
        ]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    with serve(lambda m: "half \ud83d") as server, open_replies(tmp_path / "r.jsonl") as log:
        assert ask_model(open_teacher(server.url, "m"), [user("q")], log)[0]["text"] == "half ?"


def test_a_filtered_reply_has_its_own_finish_reason(tmp_path):
    with serve(lambda m: "I cannot", lambda n, m: "filtered") as server, open_replies(tmp_path / "r.jsonl") as log:
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
        with pytest.raises(InputError, match="contains a character") as e:
            open_teacher("http://localhost:1/v1")
        assert KEY not in str(e.value)


def test_the_hub_token_is_not_sent_to_a_foreign_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    with serve(echo) as server, open_replies(tmp_path / "r.jsonl") as log:
        ask_model(open_teacher(server.url, "m"), [user("q")], log)
        assert "authorization" not in {k.lower() for k in server.headers}


@pytest.mark.parametrize("url, words", [
    ("http://", "no host"), ("http:///v1", "no host"), ("http://:8000/v1", "no host"), ("https://?x", "password or a query"),
    ("http://[::1:9", "not a valid URL"), ("http://[::1]x:9/v1", "not a valid URL"), ("http://host:99999/v1", "not a valid URL"),
    ("http://host:0/v1", "not a valid URL"), ("http://host:-1/v1", "not a valid URL"), ("http://host:8o/v1", "not a valid URL"),
    ("http://ho st/v1", "not a valid URL"), ("http://host/v 1", "not a valid URL"), ("http://ho\nst/v1", "not a valid URL"),
    ("http://host/v1\n", "not a valid URL"), (" http://host/v1", "not a valid URL"), ("http://h\u00f6st/v1", "not a valid URL"),
    ("http://a..b/v1", "not a valid URL"), ("http://" + "a" * 300 + "/v1", "not a valid URL"), ("http://a_b!c/v1", "not a valid URL"),
    ("ftp://host/v1", "neither http"), ("ws://host/v1", "neither http"), ("htp://host", "neither http"), ("HTTPX://host", "neither http"),
    ("file:///etc/passwd", "neither http"), ("http:host/v1", "no host"), ("http:/host/v1", "no host"), ("http:\\\\host", "no host"),
])  # fmt: skip
def test_malformed_urls_are_one_line(url, words):
    with pytest.raises(InputError, match=words) as e:
        open_teacher(url)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("url", [
    "https://me:{}@host/v1", "https://{}@host/v1", "HTTPS://me:{}@host/v1", "https://me%3A{}%40host/v1", "https://me:{}%40host/v1",
    "https://host/v1?api_key={}", "https://host/v1?key={}", "https://host/v1#{}", "https://host?{}", "https://host/v1%3Fkey={}",
    "ftp://me:{}@host/v1", "ws://me:{}@host", "me:{}@host/v1", "https:me:{}@host/v1", "https:/me:{}@host/v1", "https:\\\\me:{}@host/v1",
    "https://me:/{}@host/v1", "https://me:?{}@host/v1", "https://me:#{}@host/v1", "https://me:{}/v1", "https://me:{}@[::1:9/v1",
    " https://me:{}@host/v1", "https://me:{}\n@host/v1", "https://me:{}@host:99999/v1", "https://{}%2540host/v1",
    "https://[::1]:{}/v1", "https://h\uff1a{}\uff20host/v1", "https://me:{}\uff20host/v1", "https://host/v1;key={}?x", "https://host/v1%3Bkey={}?x",
])  # fmt: skip
def test_no_spelling_of_a_password_is_shown(url):
    secret = "5up3r-s3cr3t"
    assert secret not in mask_url(url.format(secret))
    with pytest.raises(InputError) as e:
        open_teacher(url.format(secret))
    assert secret not in str(e.value) and "\n" not in str(e.value)
    if "@host/v1" in url and url.startswith("https://me:{}@"):
        assert "TEACHER_API_KEY" in str(e.value), "says what to do"


@pytest.mark.parametrize("url, chat", [
    ("http://host", "http://host/v1/chat/completions"), ("http://host/", "http://host/v1/chat/completions"),
    ("http://host:80/v1/", "http://host:80/v1/chat/completions"), ("https://host/v1/chat/completions", "https://host/v1/chat/completions"),
    ("https://host/v1beta/openai/", "https://host/v1beta/openai/chat/completions"), ("HTTP://[::1]:9/v1", "http://[::1]:9/v1/chat/completions"),
])  # fmt: skip
def test_the_chat_api_of_a_base_url(url, chat):
    endpoint = open_teacher(url)
    assert endpoint.url == chat and endpoint.name == endpoint.identity == url


# ---- where the key goes


def test_each_key_goes_only_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for url in ("https://api.openai.com/v1", "https://API.OpenAI.com"):
        assert open_teacher(url).key == KEY
    for url in (
        "http://localhost:8000/v1",
        "https://api.openai.com.evil.org/v1",
        "https://evil.org/api.openai.com/v1",
        "http://api.openai.com/v1",
        "https://openai.com/v1",
        "https://xapi.openai.com/v1",
    ):
        assert open_teacher(url).key is None, url
    with serve(echo) as server, open_replies(tmp_path / "r.jsonl") as log:
        ask_model(open_teacher(server.url, "m"), [user("q")], log)
        assert "authorization" not in headers_of(server)
    monkeypatch.setenv("TEACHER_API_KEY", "another-key")
    for url in ("http://localhost:8000/v1", "https://api.openai.com/v1"):
        assert open_teacher(url).key == "another-key"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(tmp_path, monkeypatch, status):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    with serve(echo) as other, open_replies(tmp_path / "r.jsonl") as log:
        where = other.url.replace("://", "://me:5ecret@") + f"?key={KEY}"
        with serve(echo, lambda n, m: (status, [("Location", where)])) as server:
            with pytest.raises(InputError, match=f"HTTP {status}: it redirects to http.*not followed") as e:
                ask_model(open_teacher(server.url, "m"), [user("q"), user("r")], log, concurrency=1)
            assert server.posts == 1 and other.posts == 0, "known after one request; the key never got there"
    assert "\n" not in str(e.value) and KEY not in str(e.value) and "5ecret" not in str(e.value)


def test_a_reply_that_echoes_the_key_is_stored_masked(tmp_path, monkeypatch, capfd):
    key = 'sk-5up3r/s3cr3t"x'
    monkeypatch.setenv("TEACHER_API_KEY", key)
    spellings = [key, "sk-5up3r%2Fs3cr3t%22x", json.dumps(key)]
    with serve(lambda m: " ".join(spellings)) as server, open_replies(tmp_path / "r.jsonl") as log:
        reply = ask_model(open_teacher(server.url, "m"), [user("q")], log)[0]
    assert reply["text"] == '[key] [key] "[key]"'
    assert "5up3r" not in (tmp_path / "r.jsonl").read_text() + "".join(capfd.readouterr())


@pytest.mark.parametrize("key", ["k3y!", "text", "stop", "s3cr3t"])
def test_a_short_key_is_masked_and_breaks_no_reply(tmp_path, monkeypatch, key):
    """A key may equal a name in the reply's JSON: only texts are masked, after the JSON has been read."""
    monkeypatch.setenv("TEACHER_API_KEY", key)
    with serve(lambda m: f"before {key} after") as server, open_replies(tmp_path / "r.jsonl") as log:
        reply = ask_model(open_teacher(server.url, "m"), [user("q")], log)[0]
    assert reply == {"text": "before [key] after", "finish_reason": "stop"}
    escaped = "".join(f"\\u{ord(c):04x}" for c in key)  # another spelling that JSON allows
    body = f'{{"choices": [{{"message": {{"content": "before {escaped} after"}}}}]}}'.encode()
    assert read_completion(body, key)[0] == "before [key] after"
    for body in (json.dumps({"error": {"message": f"bad key {key}"}}).encode(), f"bad key {key}".encode()):
        assert read_refusal(400, {}, body, key).reason == "HTTP 400: bad key [key]"
    assert key not in read_refusal(302, {"location": f"http://host/{key}"}, b"", key).reason
    with pytest.raises(RequestFailed, match=r"content filter: \[key\]"):
        read_completion(body_of(promptFeedback={"blockReason": key}), key)


def test_keys_that_are_not_masked():
    assert mask_key("EMPTY is a word", "EMPTY") == "EMPTY is a word", "no secret: local servers ask for any key"
    assert mask_key("an abc of cats", "abc") == "an abc of cats", "shorter than four characters"
    assert mask_key("no key", None) == "no key"


def test_a_shortened_reason_has_no_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    for n in (150, 185, 190, 199):
        body = json.dumps({"error": {"code": 400, "message": "x" * n + KEY}}).encode()
        with serve(echo, lambda n, m: body if m != user("fine") else None) as server:
            with open_replies(tmp_path / f"{n}.jsonl") as log:
                error = ask_model(open_teacher(server.url, "m"), [user("q"), user("fine")], log, retries=0)[0]["error"]
        assert "sk-" not in error


# ---- malformed replies


def body_of(**reply):
    return json.dumps(reply).encode()


@pytest.mark.parametrize("body, reason", [
    (body_of(choices=[]), "no choices"), (body_of(choices=None), "no choices"), (body_of(), "no choices"), (b"[]", "no choices"),
    (b"null", "no choices"), (b"7", "no choices"), (b'"text"', "no choices"), (body_of(choices={}), "no choices"),
    (body_of(choices=7), "no choices"), (body_of(choices=[None]), "no choices"), (body_of(choices="abc"), "no message"),
    (body_of(choices=[7]), "no message"), (body_of(choices=[[]]), "no message"), (completion(message=None), "no message"),
    (completion(message={}), "no text"), (completion(message=[]), "no text"), (completion(message="text"), "no text"),
    (completion(message={"content": None}), "no text"), (completion(message={"content": 7}), "no text"),
    (completion(message={"content": {"text": "x"}}), "no text"), (completion(message={"content": []}), "no text"),
    (completion(message={"content": [{"type": "image"}]}), "no text"), (completion(message={"content": [{"type": "text"}]}), "no text"),
    (completion(message={"content": None, "tool_calls": [{}]}), "calls a tool"),
    (body_of(promptFeedback={"blockReason": "SAFETY"}), "content filter: SAFETY"), (body_of(promptFeedback=[1]), "no choices"),
])  # fmt: skip
def test_a_reply_without_text_is_set_aside(body, reason):
    with pytest.raises(RequestFailed) as e:
        read_completion(body)
    assert reason in e.value.reason and e.value.remedy == "set aside"


@pytest.mark.parametrize("body", [
    b"", b"<html>", b"{", b"\xff\xfe\xfd", b'{"choices": "\xff"}', b"[" * 200_000, b'{"choices":' * 100_000, b"\x00", b'{"a": 01}',
])  # fmt: skip
def test_a_body_that_is_not_json_is_asked_again(body):
    with pytest.raises(RequestFailed) as e:
        read_completion(body)
    assert e.value.remedy == "retry" and "not JSON" in e.value.reason


@pytest.mark.parametrize("choice, want", [
    ({}, ("text", "stop")), ({"finish_reason": None}, ("text", "stop")), ({"finish_reason": ["length"]}, ("text", "stop")),
    ({"finish_reason": "length"}, ("text", "length")), ({"finish_reason": "content_filter"}, ("text", "content_filter")),
    ({"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}, ("ab", "stop")),
    ({"message": {"content": None}, "finish_reason": "length"}, ("", "length")),
    ({"message": {"content": "text", "reasoning_content": "hm", "reasoning": "hm"}}, ("text", "stop")),
    ({"message": {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}}, ("a", "stop")),
    ({"message": {"content": "", "reasoning_content": "cut"}, "finish_reason": "length"}, ("", "length")),
    ({"message": {"content": None}, "finish_reason": "content_filter"}, ("", "content_filter")),
    ({"message": None, "finish_reason": "content_filter"}, ("", "content_filter")), ({"message": {"content": ""}}, ("", "stop")),
    ({"logprobs": float("nan")}, ("text", "stop")), ({"logprobs": -float("inf")}, ("text", "stop")),
])  # fmt: skip
def test_replies_of_real_endpoints(choice, want):
    assert read_completion(completion(**choice))[:2] == want


@pytest.mark.parametrize("usage", [
    ("1", "2"), (1.0, 2.0), (-1, 2), (1, None), (True, True), ([1], {}), (float("nan"), 1), (float("inf"), 1), (10**12, 1), (1,), (),
])  # fmt: skip
def test_implausible_usage_counts_as_unknown(usage):
    assert read_completion(completion(usage=usage))[2] is None
    assert read_completion(completion(usage=(3, 0)))[2] == [3, 0]


@pytest.mark.parametrize(
    "usage",
    [
        b"null",
        b"7",
        b"[]",
        b'{"prompt_tokens": %s, "completion_tokens": 1}' % (b"9" * 4000),
        b'{"prompt_tokens": %s, "completion_tokens": 1}' % (b"9" * 6000),
        b'{"prompt_tokens": 1e999, "completion_tokens": -1e999}',
    ],
)
def test_implausible_usage_loses_no_reply(tmp_path, usage):
    body = completion().replace(json.dumps({"prompt_tokens": 1, "completion_tokens": 2}).encode(), usage)
    assert usage in body
    with serve(echo, lambda n, m: body) as server, open_replies(tmp_path / "r.jsonl") as log:
        options = {"budget": 10_000, "tokens_per_minute": 10**9, "prices": (1.0, 1.0)}
        replies = ask_model(open_teacher(server.url, "m"), [user("y" * 29)], log, **options)
        assert replies == [{"text": "text", "finish_reason": "stop"}] and log.spent == [29 // 3 + 1 + 4, 4 // 3 + 1]


@pytest.mark.parametrize("status, error, remedy, reason", [
    (400, {"code": "content_filter", "message": "x"}, "set aside", "content filter: HTTP 400: x"),
    (400, {"innererror": {"code": "ResponsibleAIPolicyViolation"}, "message": "x"}, "set aside", "content filter"),
    (400, {"code": "DataInspectionFailed", "message": "Output data may contain inappropriate content."}, "set aside", "content filter"),
    (403, {"code": 403, "message": "Your input was flagged by moderation"}, "set aside", "content filter"),
    (400, {"message": "context length"}, "set aside", "HTTP 400: context length"), (413, {"message": "x"}, "set aside", "HTTP 413"),
    (400, 7, "set aside", "HTTP 400"), (400, [], "set aside", "HTTP 400"), (400, {"message": {"deep": 1}}, "set aside", "HTTP 400"),
    (401, {"message": "x"}, "end", "HTTP 401: x; set TEACHER_API_KEY"), (402, {}, "end", "no credit"), (404, {}, "end", "check the URL"),
    (408, {}, "retry", "HTTP 408"), (429, {}, "retry", "HTTP 429"), (500, {}, "retry", "HTTP 500"), (599, {}, "retry", "HTTP 599"),
])  # fmt: skip
def test_refusals(status, error, remedy, reason):
    failure = read_refusal(status, {}, json.dumps({"error": error}).encode())
    assert failure.remedy == remedy and reason in failure.reason


def test_an_error_within_an_http_200():
    for code, remedy in (
        (429, "retry"),
        (502, "retry"),
        (400, "set aside"),
        (None, "retry"),
        ("x", "retry"),
        (7, "retry"),
    ):
        with pytest.raises(RequestFailed) as e:
            read_completion(body_of(error={"code": code, "message": "no"}))
        assert e.value.remedy == remedy and e.value.reason.endswith(": no")


def test_a_reason_is_one_short_printable_line():
    for body in (
        b"\x1b[2J\x07" + b"x\n" * 100_000,
        json.dumps({"error": {"message": "a\nb\x1b" * 9999}}).encode(),
        b"\xff" * 999,
    ):
        reason = read_refusal(400, {}, body).reason
        assert reason.isprintable() and len(reason) < 250


@pytest.mark.parametrize("value, seconds", [
    (None, 0), ("", 0), ("0", 0), ("1", 1), ("1.5", 1.5), (" 7 ", 7), ("-5", 0), ("120", 120), ("86400", 120), ("9" * 5000, 120),
    ("1e999", 120), ("inf", 120), ("-inf", 0), ("nan", 0), ("soon", 0), ("1, 2", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ("Fri, 31 Dec 9999 23:59:59 GMT", 120), ("Fri, 31 Dec 0000 23:59:59 GMT", 0), ("Fri, 99 Foo 2030 99:99:99", 0), ("\xff", 0),
])  # fmt: skip
def test_retry_after_in_every_form(value, seconds):
    assert retry_after(value) == seconds
