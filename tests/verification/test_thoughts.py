"""verification/thoughts.py: the thought before an answer, and everything that only looks like one."""

import time

import pytest

from verification.answers import check_reply
from verification.thoughts import without_thought


@pytest.mark.parametrize("reply, answer", [
    ("<think>2 + 2?</think>\n\n4", "4"), ("\n<think>\n2\n\n</think>\n4 \n", "4 \n"), ("<THINK>a</Think> 4", "4"),
    ("<think>\n\n</think>\n\nYes", "Yes"), ("<think>a</think><think>b</think>c", "c"), ("<think>a</think>", ""),
    ("<thinking>a</thinking>b", "b"), ("<thought>a</thought>b", "b"), ("<seed:think>a</seed:think>b", "b"),
    ("[THINK]a[/THINK]b", "b"), ("◁think▷a◁/think▷b", "b"), ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
    ("<think>a </thinking> b</think>c", "c"),
    ("<think>cut off", ""), ("<think>", ""), ("<think>a</think>\n<think>cut off", ""),
    # the template has opened the thought
    ("Okay, 2 + 2.\n</think>\n\n4", "4"), ("Okay.</think>\n4", "4"), ("</think>4", "4"), ("a\n[/THINK]b", "b"),
    # no thoughts
    *((text, text) for text in (
        "", "4", " 4 ", "I think 4", "Use <think> and </think>.", "The tag </think> ends a thought.",
        "A template:\n<think>\na\n</think>\nb", "Write <think>\n</think>\nb", "<thinker>a</thinker>", "<think a>", "thinking: a",
    )),
])  # fmt: skip
def test_thoughts(reply, answer):
    assert without_thought(reply) == answer


def test_long_replies_take_linear_time():
    start = time.process_time()
    for text in (
        "<think>a</think>" * 50_000,
        "a </think> " * 50_000,
        "<think " * 50_000,
        " " * 500_000,
        "a\n" * 200_000,
    ):
        without_thought(text)
    assert time.process_time() - start < 30


@pytest.mark.parametrize("kind, reference, right, wrong", [
    ("number", 4, "<think>It is 5.</think>4", "<think>It is 4.</think>It is unclear."),
    ("exact", "yes", "<think>no</think>yes", "<think>yes"),
    ("choice", {"letter": "A", "choices": {"A": "red", "B": "blue"}}, "<think>The answer is (B).</think>The answer is (A).",
     "<think>The answer is (A).</think>The answer is (B)."),
    ("format", {"instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]}, '<think>hm</think>{"a": 1}', "hm"),
    ("code", {"tests": "assert f() == 4", "entry_point": "f"}, "<think>```\ndef f(): return 5\n```</think>```\ndef f(): return 4\n```",
     "<think>```\ndef f(): return 4\n```</think>```\ndef f(): return 5\n```"),
])  # fmt: skip
def test_an_answer_inside_a_thought_does_not_count(kind, reference, right, wrong):
    assert check_reply(kind, right, reference) is True
    assert check_reply(kind, wrong, reference) is False
