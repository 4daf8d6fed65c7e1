"""contamination.py: evaluation questions behind markup, in prompts and responses. The matching itself is tested in test_dedup.py."""

import json
import random

import pytest
from test_steps import ASKER, ask_with, lines_of, user

from curation import contamination, steps

WORDS = "river stone lamp bridge walks slowly under old new green night garden horse paper clock winter seven doors open".split()


def questions(n=200, size=26):
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) + str(rng.randrange(9)) for _ in range(size)) + "?" for _ in range(n)]


MARKUP = [
    "**{}**",
    "__{}__",
    "*{}*",
    "_{}_",
    "***{}***",
    "`{}`",
    "~~{}~~",
    "<b>{}</b>",
    '<span class="x">{}</span>',
    "${}$",
    "\\({}\\)",
    "$\\text{{{}}}$",
    "\\textbf{{{}}}",
    "\\emph{{\\underline{{{}}}}}",
    "[{}](http://x.y/z)",
]


@pytest.mark.parametrize("mark", MARKUP)
@pytest.mark.parametrize("every", [1, 5])
def test_questions_are_found_behind_markup(mark, every):
    """In a prompt by itself and in a longer response; and the marks in the question, not in the text."""
    asked = questions()
    marked = [" ".join(mark.format(w) if i % every == 0 else w for i, w in enumerate(q.split())) for q in asked]
    index = contamination.build_index(asked)
    numbers = list(range(len(asked)))
    assert contamination.find_contamination(marked, index).tolist() == numbers
    replies = [f"Here is an exercise.\n\n> {text}\n\nThe answer is 12." for text in marked]
    assert contamination.find_contamination(replies, index).tolist() == numbers
    assert contamination.find_contamination(asked, contamination.build_index(marked)).tolist() == numbers


def test_lists_headings_quotes_and_chinese():
    question = "A mason builds a wall of 12 rows. He breaks 15 bricks. Each brick costs 2 euros. How much does he pay for all of them?"
    text = "## Exercise\n> - " + question.replace(". ", ".\n> - ")
    chinese = "下列关于税法基本原则的表述中不正确的是哪一个"
    index = contamination.build_index([question, chinese])
    assert contamination.find_contamination(
        [text, "下列**关于税法**基本*原则*的表述中不正确的是哪一个"], index
    ).tolist() == [0, 1]


@pytest.mark.parametrize("text, plain", [
    ("2 * 3 * 4", "2 * 3 * 4"), ("2*3*4", "2*3*4"), ("x ** y ** z", "x ** y ** z"), ("a_b_c", "a_b_c"), ("He went ____ there", "He went ____ there"),
    ("x < y and y > z", "x < y and y > z"), ("**a b** c", "a b c"), ("***a***", "a"), ("\\frac{1}{2} of $x^{2}$", "1/2 of x^2"),
    ("3 \\times 4 \\leq 5", "3 × 4 ≤ 5"), ("costs \\$5", "costs 5"), ("# Title\n- one\n> two", "Title\none\ntwo"), ("plain text.", "plain text."),
])  # fmt: skip
def test_markup_is_removed_and_mathematics_is_kept(text, plain):
    assert contamination.strip_markup(text) == plain


def test_texts_that_differ_in_a_sign_stay_different():
    def held(text, question):
        return contamination.find_contamination([text], contamination.build_index([question])).tolist() == [0]

    assert held("What is **2 * 3** in numbers?", "What is 2 * 3 in numbers?")
    assert not held("What is 2 ** 3 in numbers?", "What is 2 * 3 in numbers?")
    assert not held("What is 2 + 3 in numbers?", "What is **2 * 3** in numbers?")


def collected(*pairs):
    about = {"source": "s", "reference": None, "language": "en", "task_type": "t", "license": None, "primary": "p"}
    return [{"id": str(i), "prompt": user(q), "response": r, **about} for i, (q, r) in enumerate(pairs)]


def test_responses_that_contain_a_question_are_removed(tmp_path, monkeypatch):
    """Of the original and of the teacher; the record stays, with its other responses."""
    first, second = questions(2)
    exam = tmp_path / "exam.jsonl"
    exam.write_text("".join(json.dumps({"question": q}) + "\n" for q in (first, second)))
    records = collected(
        ("Make up a problem.", f"**{first}** It is 5."),
        ("Another one, please.", "Count to ten."),
        (f"Solve: {first}", "6"),
    )
    args, counts = type("Args", (), {"hamming": 0, "recorded": [], "samples": 1}), {}
    lines = list(steps.deduplicate(args, lines_of(tmp_path, records), [str(exam)], counts))
    kept = [line for is_kept, line in lines if is_kept]
    assert [(r["id"], r["response"]) for r in kept] == [("0", None), ("1", "Count to ten.")]
    assert counts["responses removed"] == 1 and sum(counts["contaminated by"].values()) == 1
    replies = {
        "Make up a problem.": "What is two and two?",
        "Another one, please.": f"How about this:\n{second.upper()}",
    }
    ask_with(monkeypatch, lambda model, messages, options: replies[messages[-1]["content"]])
    answered = [r for _, r in steps.respond(args, lines_of(tmp_path, kept), ASKER, ASKER, [str(exam)], counts)]
    assert [{w: r["text"] for w, r in record["responses"].items()} for record in answered] == [
        {"teacher": "What is two and two?", "small": "What is two and two?"},
        {"original": "Count to ten."},
    ]
    assert counts["left out"] == {
        "original: empty": 1,
        "teacher: contains an evaluation question": 1,
        "small: contains an evaluation question": 1,
    }


def test_the_better_copy_is_not_the_one_that_loses_its_response(tmp_path):
    [question] = questions(1)
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": question}) + "\n")
    records = collected(("Make up a problem.", f"{question} It is 5."), ("Make up a problem.", "Short."))
    lines = list(steps.deduplicate(type("Args", (), {"hamming": 0}), lines_of(tmp_path, records), [str(exam)], {}))
    assert [line["response"] for is_kept, line in lines if is_kept] == ["Short."]


def test_a_response_that_is_nearly_a_question_stays():
    """'Write this word two times in a row: "road"' is a question; a response that repeats such an instruction is no leak."""
    question = 'Write this word two times in a row: "road"'
    index = contamination.build_index([question])
    for_responses = contamination.without_near_questions(index)
    near = "Write this word two times in a row:"
    assert contamination.find_contamination([near, question], index).tolist() == [0, 0]
    assert contamination.find_contamination([near, f"Sure: {question}"], for_responses).tolist() == [-1, 0]


def test_a_short_question_is_found_in_every_turn_of_a_conversation(tmp_path):
    question, exam = "What is the capital of the country of France?", tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": question}) + "\n")
    system = {
        "role": "system",
        "content": "You are a helpful assistant. Think step by step and give a long, full answer.",
    }
    chat = [{"role": "user", "content": "Hello, I would like to learn something about towns today."}]
    chat.append({"role": "assistant", "content": "With pleasure. Which ones are you interested in, may I ask?"})
    asks, near = ({"role": "user", "content": text} for text in (question, question.replace("country ", "")))
    prompts = [[asks], [system, asks], [system, near], [*chat, asks], [asks, chat[1], chat[0]]]
    others = [[system, chat[0]], [system, *chat, {"role": "user", "content": "What is the capital of Spain?"}]]
    records = collected(*(("", "r") for _ in (*prompts, *others)))
    for record, prompt in zip(records, [*prompts, *others], strict=True):
        record["prompt"] = prompt
    lines = list(steps.deduplicate(type("Args", (), {"hamming": 0}), lines_of(tmp_path, records), [str(exam)], {}))
    assert [is_kept for is_kept, _ in lines] == [False] * len(prompts) + [True] * len(others)
    assert {line["reason"] for is_kept, line in lines if not is_kept} == {"contains an evaluation question"}
