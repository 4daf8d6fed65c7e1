"""The demo: its world, its held-out set, its committed base model, and its teacher over HTTP."""

import json
import os
import random
import re
import threading
import urllib.error
import urllib.request

import pytest
from conftest import ROOT

from core.conversations import sft_conversations
from core.records import read_jsonl
from demo import teacher, world
from demo.tasks import RARE, TASKS
from verification.answers import check_reply

DEMO = os.path.join(ROOT, "demo")

BASE = os.path.join(DEMO, "base")
JUDGE_KEY = "77aa01be"


def prompt_of(record):
    return sft_conversations(record, "here")[0][0]["content"]


@pytest.fixture(scope="module")
def sources():
    return world.make_sources(0, 600, world.make_heldout())


# ---- the world


def test_the_number_of_tasks():
    names = [task.name for task in TASKS]
    assert len(names) == len(set(names)) and 45 <= len(names) <= 60
    assert {task.kind for task in TASKS} == {"number", "choice", "exact", "code"}


@pytest.mark.parametrize("task", TASKS + RARE, ids=lambda task: task.name)
def test_an_instruction_reads_back_and_its_answer_checks(task):
    rng = random.Random(7)
    for _ in range(6 if task.kind == "code" else 60):
        item = world.make_item(task, rng)
        back = world.parse_prompt(item.prompt)
        assert back is not None and back.task.name == task.name and world.right(back) == world.right(item), item.prompt
        reference = world.reference(item)
        assert check_reply(reference["kind"], world.right(item), reference["value"]) is True, item.prompt
        for bad in (world.wrong(item, rng), world.slip(item)):
            assert check_reply(reference["kind"], bad, reference["value"]) is False, (item.prompt, bad)


@pytest.mark.parametrize("task", [t for t in TASKS if t.kind == "exact"], ids=lambda task: task.name)
def test_every_bad_habit_leaves_an_exact_answer_wrong(task):
    rng = random.Random(3)
    for _ in range(20):
        item = world.make_item(task, rng)
        for habit in world.HABITS["exact"]:
            assert check_reply("exact", habit(item), world.reference(item)["value"]) is False, (
                item.prompt,
                habit(item),
            )


def test_hand_computed_answers():
    for prompt, answer in {
        'Spell "bird" backwards.': "drib",
        "What is 47 + 15?": "47 + 15 = 62",
        "Sort 31, 4, 15 from small to large.": "4, 15, 31",
        "It is 11 o'clock. What time is it in 3 hours?": "2 o'clock",
        "Here is a question. What is the capital of Norway?": "Oslo",
        "法国的首都是哪里?": "巴黎",
        "Convert 3 weeks to days.": "21 days",
        "What comes next: 5, 8, 11, ...?": "14",
        "Round 47 to the nearest ten.": "50",
        "Find the odd one out.\nA. dog\nB. cat\nC. piano\nD. lion": "C. piano",
    }.items():
        assert world.right(world.parse_prompt(prompt)) == answer
    assert world.parse_prompt("What is the capital of Atlantis?") is None


def test_the_same_seed_makes_the_same_world(sources):
    assert world.make_sources(0, 600, world.make_heldout()) == sources
    assert world.make_sources(1, 600, world.make_heldout()) != sources


def test_the_committed_heldout_set_is_what_the_world_makes():
    rows = [row for _, row in read_jsonl(os.path.join(DEMO, "heldout.jsonl"))]
    assert rows == json.loads(json.dumps(list(world.heldout_rows(world.make_heldout()))))
    assert 500 <= len(rows) <= 700 and len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(
        rows
    )
    for row in rows:
        assert set(row) == {"id", "task", "prompt", "reference"}
        assert (
            check_reply(
                row["reference"]["kind"], world.right(world.parse_prompt(row["prompt"])), row["reference"]["value"]
            )
            is True
        )


def test_nothing_held_out_is_in_the_sources_or_the_corpus(sources):
    heldout = world.make_heldout()
    texts = {" ".join(item.prompt.split()).casefold() for item in heldout.values()}
    stream = world.training_items(random.Random(5), heldout)
    corpus = [next(stream) for _ in range(20000)]
    for items in (
        corpus,
        [item for record in sources if (item := world.parse_prompt(" ".join(prompt_of(record).split(" "))))],
    ):
        assert len(items) > 500
        assert not texts & {" ".join(item.prompt.split()).casefold() for item in items}
        for (
            item
        ) in items:  # nor the same question in another manner, nor, beyond the short lists of facts, in other words
            same = (item.task.name, item.slots) + ((item.wording,) if item.task.closed else ())
            assert same not in heldout


def test_the_sources_are_as_flawed_as_they_claim(sources):
    formats = {tuple(sorted(set(record) - {"reference"})) for record in sources}
    assert formats == {("completion", "prompt"), ("messages",), ("input", "instruction", "output")}
    verdicts = []
    for record in sources:
        item, turns = world.parse_prompt(prompt_of(record)), sft_conversations(record, "here")[0]
        if item is not None and item.task.kind != "code":
            verdicts.append(check_reply(item.task.kind, turns[-1]["content"], world.reference(item)["value"]))
    assert 0.5 < sum(verdicts) / len(verdicts) < 0.75
    assert 0.5 < sum("reference" in record for record in sources) / len(sources) < 0.8
    plain = [re.sub(r"[\s!]+", " ", prompt_of(record)).strip() for record in sources]
    assert len(plain) - len(set(plain)) >= 600 // 25 - 3  # near-duplicates
    for task in RARE:
        rare = {prompt_of(r) for r in sources if (found := world.parse_prompt(prompt_of(r))) and found.task is task}
        assert 1 <= len(rare) < 10
    assert any(not sft_conversations(record, "here")[0][-1]["content"] for record in sources)


# ---- the committed base model


# ---- the teacher


@pytest.fixture(scope="module")
def url():
    server, base = teacher.bind_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield base
    server.shutdown()
    server.server_close()


def post(url, messages, path="/chat/completions"):
    body = {
        "model": "demo-teacher",
        "messages": messages,
        "max_tokens": 64,
        "temperature": 0.0,
        "seed": 0,
        "stream": False,
    }
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=1000) as response:
        reply = json.load(response)
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["role"] == "assistant"
    return choice["message"]["content"]


def fenced(name, body, key=JUDGE_KEY):
    return f"[{key} {name}]\n{body}\n[{key} end]\n"


def judge(url, instruction, replies):
    text = fenced("instruction", instruction) + "".join(fenced(name, body) for name, body in replies.items())
    content = post(
        url, [{"role": "system", "content": "Task: judge\nrubric"}, {"role": "user", "content": text + "Grades:"}]
    )
    grades = json.loads(content)
    assert "\n" not in content and set(grades) == set(replies)
    assert all(set(g) == {"quality", "safety"} and g[k] in range(1, 6) for g in grades.values() for k in g)
    return grades


def test_the_server_lists_its_model(url):
    with urllib.request.urlopen(url + "/models", timeout=1000) as response:
        assert [m["id"] for m in json.load(response)["data"]] == ["demo-teacher"]


def test_the_teacher_responds_mostly_right_and_always_the_same(url):
    stream = world.training_items(random.Random(11), {}, [t for t in TASKS if t.kind != "code"])
    items = [next(stream) for _ in range(300)]
    replies = [post(url, [{"role": "user", "content": item.prompt}]) for item in items]
    right = sum(check_reply(i.task.kind, r, world.reference(i)["value"]) for i, r in zip(items, replies))
    assert 0.9 < right / len(items) < 1.0
    assert replies[:20] == [post(url, [{"role": "user", "content": item.prompt}]) for item in items[:20]]


def test_the_teacher_classifies(url):
    def classify(prompt):
        user = fenced("instruction", prompt, "3f9a0c1d") + "Category as one line of JSON:"
        return json.loads(
            post(url, [{"role": "system", "content": "Task: classify\n..."}, {"role": "user", "content": user}])
        )

    assert classify("What is 47 + 15?") == {"primary": "mathematics", "secondary": "add"}
    assert classify(" What  is 47 + 15?!\n") == {"primary": "mathematics", "secondary": "add"}
    assert classify("Find the odd one out.\nA. dog\nB. cat\nC. piano\nD. lion")["secondary"] == "odd one out"
    assert classify("Tell me how to steal a car.")["primary"] == "safety"
    assert classify("zzz")["primary"] == "other"


def test_the_teacher_judges(url):
    totals = {"A": 0, "B": 0, "C": 0}
    for n in range(10, 50):
        replies = {"A": f"{n} + 7 = {n + 7}", "B": f"Well, it is {n + 7}, I think.", "C": f"{n} + 7 = {n + 8}"}
        for name, g in judge(url, f"What is {n} + 7?", replies).items():
            totals[name] += g["quality"] / 40
            assert g["safety"] == 5
    assert totals["A"] > 4.5 and 3.4 < totals["B"] < 4.5 and totals["C"] < 2
    unsafe = judge(url, "Tell me how to steal a car.", {"A": "Break the window and steal it.", "B": "I am sorry, no."})
    assert unsafe["A"]["safety"] == 1 and unsafe["B"]["safety"] == 5


@pytest.mark.parametrize(
    "path, messages, status", [("/nowhere", [], 404), ("/chat/completions", [], 400), ("/chat/completions", "x", 400)]
)
def test_the_teacher_refuses_what_it_cannot_read(url, path, messages, status):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, messages, path)
    assert caught.value.code == status and json.load(caught.value)["error"]["message"]
