"""sources.py: every shape and every broken file, the hub, recorded responses, evaluation questions."""

import gzip
import json
import os

import pytest

from core import records
from core.files import InputError
from core.records import expand, read_objects
from curation import sources
from verification.answers import check_reference, check_reply


def user(text):
    return [{"role": "user", "content": text}]


def unify(obj):
    found = sources.instructions(obj, "f:1", 1000)
    for r in found:
        if r["reference"]:
            check_reference(r["reference"], "f:1")
    return [(r["prompt"], r["response"], r["reference"]) for r in found]


SHAPES = [
    {"messages": [*user("q"), {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
                  {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    {"messages": [*user("q"), {"role": "assistant", "content": "a"}], "label": True},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
    {"chosen_messages": [*user("q"), {"role": "assistant", "content": "a"}], "rejected_messages": [*user("q"), {"role": "assistant", "content": "b"}]},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"chosen": [*user("q"), {"role": "assistant", "content": "a"}], "rejected": [*user("q")]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "completion": "a"},
    {"prompt": user("q"), "completion": [{"role": "assistant", "content": "a"}], "label": True},
    {"instruction": "q", "input": "", "output": "a"},
    {"instruction": "q", "response": " a\r\n"},
    {"instruction": "q", "input": "", "output": ["a", "worse"]},
    {"instruction": "q", "output_1": "b", "output_2": "a", "preference": 2},
    {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.0},
    {"instruction": "q", "instances": [{"input": "", "output": "a"}]},
    {"question": "q", "answer": "a"},
    {"question": "q", "std_answer": "a"},
]  # fmt: skip


@pytest.mark.parametrize("obj", SHAPES, ids=lambda o: "+".join(o))
def test_every_shape_gives_the_same_record(obj):
    assert unify(obj) == [(user("q"), "a", None)]


def test_shapes_with_more_than_one_turn_or_part():
    assert unify({"instruction": "do", "input": "this", "output": "a"}) == [(user("do\nthis"), "a", None)]
    assert unify({"instruction": "q", "output": ""}) == [(user("q"), None, None)], (
        "without a response, it is still an instruction"
    )
    assert unify({"prompt": "q"}) == [(user("q"), None, None)]
    two = {"instruction": "i", "instances": [{"input": "1", "output": "a"}, {"input": "2", "output": "b"}]}
    assert unify(two) == [(user("i\n1"), "a", None), (user("i\n2"), "b", None)]
    history = {"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]], "system": "s"}
    [(prompt, response, _)] = unify(history)
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "user"] and response == "a2"
    hh = {
        "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b",
        "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: c",
    }
    assert unify(hh)[0][0] == [*user("q"), {"role": "assistant", "content": "a"}, *user("r")]


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize("obj, prompt", [
    ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, user("q\nc")),  # Dolly
    ({"instruction": "q", "context": "", "response": "a"}, user("q")),
    ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, *user("q")]),  # OpenOrca
    ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [SYSTEM, *user("q")]),
    ({"system": "s", "messages": [*user("q"), {"role": "assistant", "content": "a"}]}, [SYSTEM, *user("q")]),
    ({"system": "s", "prompt": "q", "completion": "a"}, [SYSTEM, *user("q")]),
    ({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, [SYSTEM, *user("q")]),
    ({"messages": None, "instruction": "q", "input": None, "output": "a", "system": None, "reference": None}, user("q")),
])  # fmt: skip
def test_contexts_and_system_prompts_are_kept(obj, prompt):
    assert unify(obj) == [(prompt, "a", None)]


def test_an_undesirable_reply_is_no_response():
    for key in ("label", "kto_tag"):
        for record in (
            {"prompt": "q", "completion": "a"},
            {"messages": [*user("q"), {"role": "assistant", "content": "a"}]},
        ):
            unread = set()
            (one,) = sources.instructions(record | {key: False}, "f:1", 99, unread)
            assert (one["prompt"], one["response"], unread) == (user("q"), None, set())
            assert unify(record | {key: True}) == [(user("q"), "a", None)]
    assert unify({"prompt": "q", "chosen": "a", "rejected": "b", "label": False}) == [(user("q"), "a", None)]


def test_unused_keys_are_collected():
    unread = set()
    record = {
        "prompt": "q",
        "chosen": "a",
        "rejected": "b",
        "reference": "x",
        "license": "mit",
        "score": 3,
        "tags": None,
    }
    sources.instructions(record, "f:1", 99, unread)
    assert unread == {"rejected", "score"}
    unweighted = [*user("q"), {"role": "assistant", "content": "a", "weight": 0}]
    assert unify({"messages": unweighted}) == [(user("q"), None, None)], (
        "a reply that nobody should learn is no response"
    )


def test_references_are_read_where_a_set_writes_them():
    gsm = {"question": "q", "answer": "Half is 48/2 = <<48/2=24>>24.\n#### 1,024"}
    assert unify(gsm) == [(user("q"), "Half is 48/2 = 24.\nThe answer is 1024.", {"kind": "number", "value": "1024"})]
    aqua = {
        "instruction": "How much?\\nOptions:\\n(A) 3\\n(B) Rs. 4 each\\n(C) 5 Let's think first:",
        "output": "So the answer is (B).",
    }
    [(prompt, response, reference)] = unify(aqua)
    assert reference == {"kind": "choice", "value": {"letter": "B", "choices": {"A": "3", "B": "Rs. 4 each", "C": "5"}}}
    assert "\n(B) Rs. 4 each\n" in prompt[0]["content"]
    given_by_hand = {"prompt": "q", "completion": "a", "reference": {"kind": "exact", "value": "a"}}
    assert unify(given_by_hand)[0][2] == {"kind": "exact", "value": "a"}
    undecided = {"instruction": aqua["instruction"], "output": "I wonder whether a \\neq b."}
    assert unify(undecided) == [(prompt, "I wonder whether a \\neq b.", None)], (
        "the prompt does not hang on the response"
    )
    assert unify({"prompt": 'Options: print("a\\n")', "completion": "a"})[0][0] == user('Options: print("a\\n")')
    with pytest.raises(InputError, match="f:1: reference needs a kind"):
        unify({"prompt": "q", "reference": {"kind": "exakt", "value": 1}})


MBPP = {
    "task_id": 601,
    "text": "Write a function to add one.",
    "code": "def one():\r\n    return 1\r\ndef inc(x):\r\n    return x + one()",
    "test_list": ["assert inc(1) == 2", "assert inc(-1) == 0"],
}


def test_code_with_tests_is_a_source():
    prompt = (
        "Write a function to add one.\nYour code should pass these tests:\n\nassert inc(1) == 2\nassert inc(-1) == 0"
    )
    code = "def one():\n    return 1\ndef inc(x):\n    return x + one()"
    value = {"tests": "assert inc(1) == 2\nassert inc(-1) == 0", "entry_point": "inc"}
    want = [(user(prompt), code, {"kind": "code", "value": value})]
    assert unify({**MBPP, "test_setup_code": "", "challenge_test_list": []}) == want
    assert check_reply("code", code, value) is True and check_reply("code", "def inc(x):\n    return 2", value) is False
    sanitized = {key: MBPP[key] for key in ("task_id", "code", "test_list")} | {
        "prompt": MBPP["text"],
        "test_imports": ["import math"],
    }
    [(asked, _, reference)] = unify(sanitized)
    assert asked == user(prompt) and reference["value"]["tests"] == "import math\n" + value["tests"]
    unread = set()
    sources.instructions({**MBPP, "challenge_test_list": []}, "f:1", 1000, unread)
    assert unread == {"challenge_test_list"}
    tests = ({"test_list": []}, {"test_list": [1]}, {"test_list": "assert inc(1) == 2"}, {"code": 1})
    for broken in (*tests, {"test_imports": "import re"}, {"test_imports": 1}):
        with pytest.raises(InputError, match="f:1: no known shape"):
            unify({**MBPP, **broken})


@pytest.mark.parametrize("mark", ["#### .", "#### ...", "#### ,", "####"])
def test_a_heading_without_a_digit_is_no_number(mark):
    assert unify({"question": "How many?", "answer": f"So\n{mark}"})[0][2] is None
    assert unify({"question": "How many?", "answer": "So\n#### 1,200."})[0][2] == {"kind": "number", "value": "1200"}


def test_format_references():
    value = {
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"relation": "at least", "num_words": 30}],
    }
    want = {"kind": "format", "value": value}
    assert (
        unify({"key": 1, "prompt": "q", **value})[0][2]
        == unify({"prompt": "q", "completion": "a", "reference": want})[0][2]
        == want
    )
    for broken, what in (
        ({"kwargs": []}, "as many kwargs"),
        ({"instruction_id_list": []}, "as many kwargs"),
        ({"kwargs": [{}]}, "cannot be used"),
        ({"instruction_id_list": ["length:words"]}, "unknown instruction 'length:words'"),
    ):
        with pytest.raises(InputError, match=f"^f:1: .*{what}"):
            unify({"prompt": "q", **value, **broken})


@pytest.mark.parametrize("obj, what", [
    ({"text": "plain"}, "f:1: no known shape"),
    ({"messages": [{"role": "user"}]}, "f:1: message 0 (user) has no content"),
    ({"messages": [*user("q"), {"role": "assistant", "content": None}]}, "f:1: message 1 (assistant) has no content"),
    ({"messages": None, "prompt": None}, "f:1: no known shape, the keys are all null"),
    ({"messages": []}, "f:1: expected a text or a list"),
    ({"instruction": 3, "output": "x"}, "f:1: expected a text or a list of messages, found 3"),
    ({"instruction": 3, "input": "y", "output": "x"}, "f:1: instruction, input and context are texts"),
    ({"prompt": {"a": 1}, "completion": "x"}, "f:1: message 0 needs a role"),
    ({"instruction": "q", "history": ["x"]}, "f:1: history"),
])  # fmt: skip
def test_malformed_records_are_errors(obj, what):
    with pytest.raises(InputError) as e:
        unify(obj)
    assert str(e.value).startswith(what)


@pytest.mark.parametrize("obj, reason", [
    ({"prompt": " ", "completion": "a"}, "an empty turn"),
    ({"prompt": "q", "completion": "a" * 1000}, "over-long"),
    ({"prompt": "caf\u00c3\u00a9", "completion": "a"}, "garbled text"),
    ({"prompt": "q", "completion": "\ufffd"}, "garbled text"),
    ({"prompt": "q", "completion": "Hello\u00c2\u00a0world"}, "garbled text"),
    ({"prompt": "It\u00e2\u20ac\u2122s", "completion": "a"}, "garbled text"),
    *(({"prompt": f"Say {text.encode().decode(code, 'ignore')}!", "completion": "a"}, "garbled text")
      for text in ("你好，请介绍中文", "中文文章", "这") for code in ("latin1", "cp1252") if (text, code) != ("这", "cp1252")),
    ({"prompt": "half an emoji \ud83d", "completion": "a"}, "garbled text"),
    ({"prompt": "who?", "completion": "I am {{name}}"}, "unfilled template"),
    ({"prompt": "q", "completion": "```python\nx = 1"}, "a response that is cut off"),
    ({"messages": [{"role": "assistant", "content": "hello"}]}, "no user turn before the response"),
    ({"messages": [*user("q"), {"role": "tool", "content": "x"}]}, "tool use"),
    ({"messages": [*user("q"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "tool use"),
    ({"messages": [*user("q"), {"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "tool use"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "tool use"),
    ({"messages": user("q"), "tools": [{"name": "f"}]}, "tool use"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "a part that is not text"),
    ({"messages": [{"role": "developer", "content": "x"}, *user("q")]}, "role developer"),
    ({"messages": [{"role": "pilot", "content": "x"}]}, "unknown role"),
])  # fmt: skip
def test_useless_records_are_dropped_with_a_reason(obj, reason):
    with pytest.raises(sources.Drop) as e:
        unify(obj)
    assert str(e.value) == reason


@pytest.mark.parametrize("text", [
    "« café\u00a0» — né en été\u00a0: ça", "the cliché”—and", "Å–Ö, çà et là", "Ääkköset “på”–", "你好，中文", "São João", "\u00a05\u00a0€",
])  # fmt: skip
def test_accents_are_not_garbled(text):
    assert unify({"prompt": text, "completion": text})[0][1] == text.replace("\u00a0", " ").strip()


ROWS = [{"prompt": f'q{i} {{["\u4f60\u597d', "n": [i, {"x": None}]} for i in range(50)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("zipped", [False, True])
def test_arrays_stream(tmp_path, monkeypatch, indent, zipped):
    monkeypatch.setattr(records, "CHUNK", 7)  # every object, character and bracket is cut somewhere
    path = str(tmp_path / "a.json") + (".gz" if zipped else "")
    with (gzip.open if zipped else open)(path, "wb") as f:
        f.write(b"\xef\xbb\xbf" + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode() + b"\n")
    read = list(read_objects(path))
    assert [obj for _, obj in read] == ROWS
    lines = open(path, encoding="utf-8-sig").read().splitlines() if not zipped else []
    if lines and indent:
        assert all(lines[line - 1] == "  {" for line, _ in read)


def test_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ROWS[:2]) + "\n\n" + json.dumps(ROWS[2]))
    assert list(read_objects(str(path))) == [(1, ROWS[0]), (2, ROWS[1]), (4, ROWS[2])]


@pytest.mark.parametrize("data, what", [
    (b'{"a": 1}\n{"a": \n', ":2: not JSON"),
    (b'{"a": 1}\n3\n', ":2: a int, not an object"),
    (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not UTF-8"),
    (b'[{"a": 1},\n {"a": }]', ":2: not JSON"),
    (b'[{"a": 1},\n 3]', ":2: not JSON: '3' where an object"),
    (b'[{"a": 1}\n {"a": 2}]', ":2: not JSON: '{' where ','"),
    (b'[{"a": 1},\n', "the file ends inside the array"),
    (b'[{"a": 1}, {"b": "\xff"}]', ":1: not UTF-8"),
    (b'{"a": 1}\n{"a": ' + b"[" * 100_000, ":2: not JSON"),
    (b'[{"a": 1},\n{"a": ' + b"[" * 100_000, ":2: not JSON"),
])  # fmt: skip
def test_broken_files_name_file_and_line(tmp_path, data, what):
    path = str(tmp_path / "x.json")
    open(path, "wb").write(data)
    with pytest.raises(InputError) as e:
        list(read_objects(path))
    assert path in str(e.value) and what in str(e.value) and "\n" not in str(e.value)


def test_missing_folder_and_truncated_gzip(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        expand([str(tmp_path / "no*.json")])
    with pytest.raises(InputError, match="a folder"):
        expand([str(tmp_path)])
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + os.urandom(4000).hex().encode() + b'"}\n')[:-900])
    with pytest.raises(InputError, match="a.jsonl.gz: cannot be read"):
        list(read_objects(str(path)))


def test_labels_tell_files_of_one_name_apart():
    assert sources.short_names(["/x/a/train.json", "/x/b/train.json"]) == ["a/train.json", "b/train.json"]
    assert sources.short_names(["/x/a/d/t.json", "/x/b/d/t.json"]) == ["a/d/t.json", "b/d/t.json"]
    assert (
        sources.short_names(["/x/mmlu/test/a.csv", "/t.json"], 3) == ["mmlu/test/a.csv", "/t.json"]
        and sources.short_names([], 3) == []
    )


# ---- evaluation questions


def test_evaluation_files_in_their_own_shapes(tmp_path):
    files = {
        "mmlu.csv": '"What, then?",a,b,c,d,A\nsecond?,a,b,c,d,B\n',
        "lines.csv": 'id,question,A\n0,"one\u2028two\nthree\x1c",a\n',
        "cmmlu.csv": ",Question,A,B,C,D,Answer\n0,What,a,b,c,d,A\n",
        "aime.csv": "ID,Problem,Answer\n1,Find x.,2\n",
        "text.csv": "Text,b,c,d,e,A\nWhy?,b,c,d,e,B\n",  # MMLU's, without a header
        "ceval.csv": "id,question,A,B,C,D,answer\n0,Why,a,b,c,d,A\n",
        "bbh.json": json.dumps({"canary": "x", "examples": [{"input": "in", "target": "t"}]}),
        "gsm8k.jsonl": '{"question": "q1", "answer": "a"}\n{"question": "q2", "answer": "a"}\n',
        "alpaca.json": json.dumps([{"instruction": "i", "input": "x", "output": "o"}]),
        "mt.jsonl": '{"turns": ["t1", "t2"], "category": "c"}\n',
        "demo.jsonl": '{"id": 1, "prompt": "p", "reference": {"kind": "number", "value": 1}}\n',
        "arc.jsonl": json.dumps({"id": "1", "question": {"stem": "s", "choices": [{"text": "t", "label": "A"}]}}),
        "hellaswag.jsonl": '{"activity_label": "a", "ctx": "c", "ctx_a": "x", "endings": ["e"], "label": 0}\n',
        "chat.jsonl": json.dumps({"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]}),
        "kto.jsonl": json.dumps({"prompt": [{"role": r, "content": r} for r in ("system", "user")], "label": True}),
        "sharegpt.jsonl": json.dumps({"conversations": [{"from": r, "value": r} for r in ("human", "gpt", "human")]}),
    }
    want = {
        "mmlu.csv": ["What, then?", "second?"],
        "lines.csv": ["one\u2028two\nthree\x1c"],
        "cmmlu.csv": ["What"],
        "aime.csv": ["Find x."],
        "text.csv": ["Text", "Why?"],
        "ceval.csv": ["Why"],
        "bbh.json": ["in"],
        "gsm8k.jsonl": ["q1", "q2"],
        "alpaca.json": ["i\nx"],
        "mt.jsonl": ["t1", "t2"],
        "demo.jsonl": ["p"],
        "arc.jsonl": ["s"],
        "hellaswag.jsonl": ["c"],
        "chat.jsonl": ["user"],
        "kto.jsonl": ["user"],
        "sharegpt.jsonl": ["human", "human"],
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert sources.evaluation_questions(str(tmp_path / name)) == want[name]
    (tmp_path / "none.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="no evaluation question"):
        sources.evaluation_questions(str(tmp_path / "none.json"))
    (tmp_path / "open.csv").write_text('question,answer\n"a quote that never ends' + "x" * 2**18)
    with pytest.raises(InputError, match="open.csv: not CSV: field larger"):
        sources.evaluation_questions(str(tmp_path / "open.csv"))


# ---- the hub, licences


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub: one data set, laid out as the hub's cache lays it out. -> the names that were asked for."""
    import huggingface_hub

    files = {
        "data/a.jsonl": '{"prompt": "q", "completion": "a"}\n',
        "data/b.jsonl": '{"prompt": "r"}\n',
        "x.json": "[]",
        "README.md": "---\nlicense: cc-by-4.0\ntags: [x]\n---\n# A set\n",
    }
    asked = []

    def download(repo_id, filename, repo_type, revision=None):
        asked.append((repo_id, filename, repo_type, revision))
        if repo_id != "some/set" or filename not in files:
            raise FileNotFoundError(f"404 Client Error\n{filename}")
        path = tmp_path / "datasets--some--set" / "snapshots" / (revision or "abc123") / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[filename])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo_id, repo_type, revision=None: list(files)
    )
    return asked


def test_files_of_the_hub(hub, tmp_path):
    [path] = expand(["hf://datasets/some/set/data/a.jsonl"])
    assert hub[0] == ("some/set", "data/a.jsonl", "dataset", None)
    assert sources.short_names([path, str(tmp_path / "a" / "own.jsonl")]) == ["some/set/data/a.jsonl", "a/own.jsonl"]
    assert [obj["prompt"] for _, obj in read_objects(path)] == ["q"]
    assert sources.licence_of_file(path) == "cc-by-4.0" and sources.licence_of_file(__file__) is None
    two = expand(["hf://datasets/some/set@v2/data/*.jsonl"])
    assert sources.short_names(two) == ["some/set/data/a.jsonl", "some/set/data/b.jsonl"] and hub[-2][3] == "v2"
    for url, what in (
        ("hf://datasets/some/set/none.json", "cannot be fetched: FileNotFoundError: 404 Client Error none.json"),
        ("hf://some/set/a.json", "not hf://datasets/OWNER/NAME/FILE"),
        ("hf://datasets/some/set/*.csv", "no such file"),
    ):
        with pytest.raises(InputError, match=what.replace("*", ".")) as e:
            expand([url])
        assert url in str(e.value) and "\n" not in str(e.value)


def test_a_records_own_licence():
    assert sources.licence({"license": "mit"}) == sources.licence({"licence": "mit"}) == "mit"
    assert sources.licence({"license": None}) is None is sources.licence({"license": {"a": 1}})


# ---- recorded responses


def test_recorded_responses(tmp_path, capsys):
    lines = [
        {"prompt": "q1", "response": "t1", "writer": None, "responses": None},
        {"prompt": " q1 ", "completion": "t1 again", "writer": "teacher"},
        {"messages": [*user("q1"), {"role": "assistant", "content": "s1"}], "writer": "small"},
        {
            "prompt": user("q2"),
            "responses": {"original": {"text": "o"}, "teacher": {"text": "t2", "verified": True}, "small-2": "s2"},
        },
        {"prompt": "unwanted", "response": "x"},
        {"prompt": "q2", "response": ""},
        {"prompt": "q2", "response": "{{name}}"},
        {"prompt": user("q2"), "responses": {"teacher": "\ufffd"}},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two = (sources.prompt_key(user(q)) for q in ("q1", "q2"))
    found = sources.recorded_responses([str(path)], {one, two})
    texts = {key: [reply["text"] for reply in replies] for key, replies in found.items()}
    assert texts == {
        ("teacher", one): ["t1", "t1 again"],
        ("small", one): ["s1"],
        ("teacher", two): ["t2"],
        ("small", two): ["s2"],
    }
    assert found["teacher", one][0]["recorded"].endswith("/r.jsonl")
    assert capsys.readouterr().err == ""
    assert sources.recorded_responses([str(path)], {b"other"}) == {}
    assert capsys.readouterr().err == f"warning: {path}: has no response to any of the 1 instructions\n"
    for line, words in (
        ({"prompt": "q", "response": "a", "writer": "me"}, 'the writer is "me"; it must be teacher or small'),
        ({"prompt": "q", "responses": ["a", "b"]}, "responses is .* an object of writers and responses"),
    ):
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(InputError, match=f"r.jsonl:1: {words}"):
            sources.recorded_responses([str(path)], set())
