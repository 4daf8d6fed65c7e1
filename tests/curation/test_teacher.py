"""curation/teacher.py: replies in order, each asked once and kept."""

import time

import pytest
from mock_endpoint import echo, environment, serve, user  # noqa: F401  (environment is a fixture)

from core.files import InputError
from curation.teacher import ask_model, open_replies, open_teacher, pick_reply, reply_key


def test_order_concurrency_and_cache(tmp_path):
    path = tmp_path / "replies.jsonl"

    def held(messages):  # until 8 are in flight
        while server.peak < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        return echo(messages)

    deadline = time.monotonic() + 100
    with serve(held) as server:
        teacher = open_teacher(server.url, "some-model")
        prompts = [user(f"q{i % 15}") for i in range(30)]
        with open_replies(path) as log:
            replies = ask_model(teacher, prompts, log, concurrency=8, max_tokens=9)
        assert [r["text"] for r in replies] == [f"re: q{i % 15}" for i in range(30)]
        assert server.posts == 15, "equal prompts are asked once"
        assert server.peak == 8, "many in flight, and never more than asked for"
        assert (
            server.body["model"] == "some-model" and server.body["max_tokens"] == 9 and server.body["temperature"] == 0
        )
        with open_replies(path) as log:
            assert ask_model(teacher, prompts, log, max_tokens=9) == replies
            assert server.posts == 15, "a second run asks nothing"
            ask_model(teacher, prompts[:1], log, max_tokens=10)
            assert server.posts == 16, "other parameters, another request"
            ask_model(open_teacher(server.url, "other-model"), prompts[:1], log, max_tokens=9)
            assert server.posts == 17, "another model, another request"


def test_torn_last_line_is_cut_off_and_damage_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    teacher = open_teacher("http://nowhere", "m")
    keys = [reply_key(teacher, user(t), {}) for t in "abc"]
    with open_replies(path) as log:
        for key, text in zip(keys, ("1", "zwei \u00e4 \u4e8c", "3")):
            log.append(key, {"model": "m", "text": text, "finish_reason": "stop"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with open_replies(path) as log:
        assert set(log) == set(keys[:2])
        assert pick_reply(log[keys[1]]) == {"text": "zwei \u00e4 \u4e8c", "finish_reason": "stop"}
        log.append(keys[2], {"model": "m", "text": "3", "finish_reason": "stop"})
    assert path.read_bytes() == whole
    path.write_bytes(b'{"key": 1}\n' + whole)
    with pytest.raises(InputError, match="r.jsonl:1: not a reply;"), open_replies(path):
        pass


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with open_replies(tmp_path / "r.jsonl"):
        with pytest.raises(InputError, match="another run"), open_replies(tmp_path / "r.jsonl"):
            pass
