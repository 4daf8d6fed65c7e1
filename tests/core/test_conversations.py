"""Records of every shape become conversations; what cannot be used is refused by file and line."""

import pytest

from core.conversations import Unusable, dialogues, kto_examples, sft_conversations
from core.files import InputError
from core.records import Fields


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


QA = [user("Q"), assistant("A")]
SHAREGPT = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
UNLEARNT = {"weight": 0}


@pytest.mark.parametrize(
    "record, conversation",
    [
        ({"messages": QA}, QA),
        ({"prompt": "Q", "completion": "A"}, QA),
        ({"prompt": [user("Q")], "completion": [assistant("A")]}, QA),
        ({"prompt": [user("Q")], "completion": assistant("A")}, QA),
        ({"prompt": "Q", "completion": "", "system": None}, [user("Q"), assistant("")]),
        ({"prompt": "Q", "completion": "A", "system": "S"}, [system("S"), *QA]),
        ({"instruction": "Q", "input": "", "output": "A"}, QA),
        ({"instruction": "Q", "output": "A"}, QA),
        ({"instruction": "Q", "input": "more", "output": "A"}, [user("Q\nmore"), assistant("A")]),
        ({"instruction": "", "input": "more", "output": "A"}, [user("more"), assistant("A")]),
        ({"instruction": "Q", "input": "", "output": "A", "system": "", "history": []}, QA),
        (
            {"instruction": "Q", "output": "A", "system": "S", "history": [["q1", "a1"], ["q2", "a2"]]},
            [system("S"), user("q1"), assistant("a1"), user("q2"), assistant("a2"), *QA],
        ),
        # Dolly, OpenOrca, question and answer, BELLE
        ({"instruction": "Q", "context": "C", "response": "A"}, [user("Q\nC"), assistant("A")]),
        ({"instruction": "Q", "context": "", "response": "A"}, QA),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, [system("S"), *QA]),
        ({"system_prompt": "", "question": "Q", "response": "A"}, QA),
        ({"question": "Q", "answer": "A"}, QA),
        ({"query": "Q", "response": "A"}, QA),
        ({"prompt": "Q", "query": "more", "response": "A"}, [user("Q\nmore"), assistant("A")]),
        ({"question": "Q", "std_answer": "A"}, QA),
        # ShareGPT
        ({"conversations": SHAREGPT}, QA),
        ({"conversations": SHAREGPT, "system": "S"}, [system("S"), *QA]),
        ({"conversations": SHAREGPT, "system": ""}, QA),
        ({"conversations": [{"from": "system", "value": "S"}, *SHAREGPT], "system": "S"}, [system("S"), *QA]),
        ({"messages": [system(""), *QA]}, [system(""), *QA]),
        # Null columns are absent ones
        ({"messages": QA, "prompt": None, "completion": None}, QA),
        ({"messages": None, "prompt": "Q", "completion": "A", "instruction": None}, QA),
        ({"messages": None, "prompt": None, "instruction": "Q", "input": None, "output": "A"}, QA),
        # Empty columns beside filled ones are absent too
        ({"messages": [], "prompt": "Q", "completion": "A", "instruction": "", "output": "", "tools": []}, QA),
        ({"messages": QA, "conversations": [], "prompt": "", "completion": "", "chosen": "", "rejected": ""}, QA),
        ({"messages": "", "instruction": "", "prompt": "Q", "output": "", "completion": "A"}, QA),
        ({"prompt": "Q", "completion": "A", "chosen": [], "rejected": [], "chosen_messages": []}, QA),
        ({"conversations": [], "messages": SHAREGPT, "system": "", "system_prompt": "S"}, [system("S"), *QA]),
        ({"messages": [{"role": "user", "content": "", "value": "Q"}, {"role": "", "from": "gpt", "value": "A"}]}, QA),
        ({"messages": QA, "tools": " [ ]\n", "functions": "null"}, QA),
        ({"prompt": "Q", "completion": "", "answer": "reference"}, [user("Q"), assistant("")]),
        # Text parts
        ({"messages": [user([{"type": "text", "text": "Q"}]), assistant([{"type": "text", "value": "A"}])]}, QA),
        ({"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("c")]},
         [user("ab"), assistant("c")]),
        ({"messages": [user([{"type": "text", "text": None, "value": "Q"}]), assistant([{"type": None, "text": "A"}])]}, QA),
        # The reply beside the turns before it
        ({"messages": [user("Q")], "response": "A"}, QA),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1]}, QA),
        ({"messages": [user("1"), assistant("a"), user("2")], "completion": [assistant("b")]},
         [user("1"), assistant("a") | UNLEARNT, user("2"), assistant("b")]),
        ({"prompt": "Q", "completion": ["A"], "system": "", "system_prompt": "S"}, [system("S"), *QA]),
        # A preference: the better reply
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, QA),
        ({"instruction": "Q", "output": ["A", "B"]}, QA),
        ({"instruction": "Q", "output_1": "B", "output_2": "A", "preference": 2.0}, QA),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "B"}}, QA),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}, QA),
    ],
)  # fmt: skip
def test_every_shape_becomes_its_conversation(record, conversation):
    assert sft_conversations(record, "f:1") == [conversation]


def test_a_prompt_that_is_rendered_already_is_warned_of(capsys):
    """Control tokens typed in a text stay text, so its turns would be one user's turn."""
    rendered = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    for line in (1, 2):
        conversation = sft_conversations({"prompt": rendered, "completion": "A"}, f"rendered.jsonl:{line}")
        assert conversation == [[user(rendered), assistant("A")]]
    said = "warning: rendered.jsonl: prompt begins with <|im_start|>"
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", "<|im_end|>\n"])
def test_a_reply_that_ends_with_an_end_token_is_warned_of(end, capsys):
    """It would be learnt as ordinary characters before the token that ends the turn."""
    name = f"ends-{len(end)}.jsonl"  # a warning is printed once in a process
    kto_examples({"prompt": "Q" + end, "completion": "A" + end, "label": True}, f"{name}:1")
    sft_conversations({"messages": [user("Q"), assistant("A" + end)]}, f"{name}:2")
    sft_conversations({"prompt": f"what is {end}", "completion": f"{end} ends a turn"}, "other.jsonl:1")
    warning = f"warning: {name}: a reply ends with {end.strip()}, which is encoded as ordinary text"
    err = capsys.readouterr().err
    assert err.startswith(warning) and err.count("\n") == 1


def learnt(record, **options):
    (messages,) = sft_conversations(record, "f:1", **options)
    return [m["content"] for m in messages if m["role"] == "assistant" and m.get("weight", 1)]


def test_which_turns_are_learnt():
    turns = [user("1"), assistant("a"), user("2"), assistant("b")]
    history = {"instruction": "2", "output": "b", "history": [["1", "a"]]}
    assert learnt({"messages": turns}) == learnt(history) == ["a", "b"]
    assert learnt({"prompt": turns[:-1], "completion": turns[-1:]}) == ["b"]  # as in TRL
    assert learnt({"prompt": turns[:-1], "chosen": "b", "rejected": "c"}) == ["b"]
    assert learnt({"messages": turns}, last_turn_only=True) == learnt(history, last_turn_only=True) == ["b"]
    for mark in ({"weight": 0}, {"loss": False}, {"loss_weight": 0.0}, {"train": False}):
        assert learnt({"messages": [turns[0], turns[1] | mark, *turns[2:]]}) == ["b"]
        assert learnt({"messages": [*turns[:3], turns[3] | mark]}) == ["a"]
    for mark in ({"weight": 1}, {"loss": True}, {"loss_weight": 1.0}, {"weight": None}):
        assert learnt({"messages": [turns[0], turns[1] | mark, *turns[2:]]}) == ["a", "b"]


def test_self_instructs_instances_are_conversations_each():
    record = {"instruction": "Q", "instances": [{"input": "x", "output": "A"}, {"input": "", "output": "B"}]}
    assert sft_conversations(record, "f:1") == [[user("Q\nx"), assistant("A")], [user("Q"), assistant("B")]]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": [user("Q")], "completion": [assistant("A")], "label": True},
        {"messages": QA, "label": True},
        {"messages": QA, "kto_tag": True, "label": None},
        {"conversations": SHAREGPT, "kto_tag": True},
        {"instruction": "Q", "input": "", "output": "A", "label": True},
    ],
)
def test_labelled_replies(record):
    assert kto_examples(record, "f:1") == [([user("Q")], "A", True)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"prompt": "Q", "chosen": QA, "rejected": [user("Q"), assistant("B")]},  # UltraFeedback's
        {"prompt": "Q", "chosen": QA, "rejected": [user("Q"), assistant("B")], "messages": QA},
        {"prompt": "Q", "chosen": "A", "rejected": "B", "messages": QA},
        {"chosen": QA, "rejected": [user("Q"), assistant("B")]},
        {"chosen_messages": QA, "rejected_messages": [user("Q"), assistant("B")]},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "B"}},
        {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B", "label": None},
        {"instruction": "Q", "output": ["A", "B"]},
        {"instruction": "Q", "output": ["A", "B", "C"]},
        {"instruction": "Q", "output_1": "B", "output_2": "A", "preference": 2},
    ],
)
def test_a_preference_is_two_examples(record):
    assert kto_examples(record, "f:1") == [([user("Q")], "A", True), ([user("Q")], "B", False)]


def test_a_preference_keeps_its_system_prompt_and_all_shared_turns():
    start = [user("1"), assistant("a"), user("2")]
    record = {"chosen": [*start, assistant("b")], "rejected": [*start, assistant("c")], "system": "S"}
    assert kto_examples(record, "f:1") == [([system("S"), *start], "b", True), ([system("S"), *start], "c", False)]
    same = {"chosen": QA, "rejected": QA}  # TRL splits before the last message here too
    assert kto_examples(same, "f:1") == [([user("Q")], "A", True), ([user("Q")], "A", False)]


@pytest.mark.parametrize(
    "parse, record, words",
    [
        (sft_conversations, {"text": "hello"}, "expected messages"),
        (sft_conversations, {"messages": None, "prompt": None}, "the keys are all null"),
        (sft_conversations, {}, "expected messages"),
        (sft_conversations, {"a\nb": 1}, r"the keys are a\\nb; expected messages"),
        (sft_conversations, {"messages": []}, "list of messages"),
        (sft_conversations, {"messages": ["hi"]}, 'message 0 is "hi"'),
        (dialogues, {"messages": '[{"role": "user"}]'}, "the conversation is .* a list of messages"),
        (dialogues, {"conversations": {"from": ["human"], "value": ["Q"]}}, "the conversation is .* a list of messages"),
        (sft_conversations, {"messages": [{"role": "user"}]}, "no content"),
        (sft_conversations, {"messages": [{"role": "user", "content": None}]}, "no content"),
        (sft_conversations, {"messages": [{"role": "user", "content": 5}]}, "no content"),
        (sft_conversations, {"messages": [{"content": "x"}]}, "needs a role"),
        (sft_conversations, {"messages": [{"role": ["user"], "content": "x"}]}, "needs a role"),
        (sft_conversations, {"messages": [user("x")]}, "no assistant"),
        (sft_conversations, {"messages": [user("x"), assistant("y", weight=0.5)]}, "weight 0.5"),
        (sft_conversations, {"messages": [user("x"), assistant("y", weight="0")]}, 'weight "0"'),
        (sft_conversations, {"messages": [user("x"), assistant("y", weight=10**400)]}, "weight 1000"),
        (sft_conversations, {"prompt": "x", "completion": 3}, "expected a text"),
        (sft_conversations, {"prompt": "x", "completion": [user("y")]}, "one assistant"),
        (sft_conversations, {"instruction": 3, "output": "x"}, "expected a text"),
        (sft_conversations, {"instruction": "x", "input": 3, "output": "x"}, "texts"),
        (sft_conversations, {"instruction": "x", "output": "x", "history": [["a"]]}, "pairs"),
        (sft_conversations, {"instruction": "x", "output": "x", "history": "a"}, "pairs"),
        (sft_conversations, {"instruction": "x", "output": "x", "history": 5}, "pairs"),
        (sft_conversations, {"prompt": [user("x")], "response": "x", "history": [["a", "b"]]}, "there is a history too"),
        (sft_conversations, {"question": "x", "answer": ["a", "b"]}, "the reply is the list"),
        (kto_examples, {"prompt": "x", "completion": ["a", "b"], "label": True}, "the reply is the list"),
        (sft_conversations, {"prompt": "x", "completion": "y", "label": False}, "its label is false"),
        (sft_conversations, {"messages": QA, "kto_tag": False}, "its label is false"),
        (sft_conversations, {"instruction": "x", "instances": []}, "instances"),
        (sft_conversations, {"instruction": "x", "instances": ["y"]}, "instances"),
        (sft_conversations, {"prompt": "x", "completion": "y", "system": 5}, "expected a text"),
        (sft_conversations, {"messages": [system("a"), *QA], "system": "b"}, "differ"),
        (kto_examples, {"prompt": "x", "completion": "y", "label": "true"}, 'label is "true"'),
        (kto_examples, {"prompt": "x", "completion": "y", "label": 1}, "label is 1"),
        (kto_examples, {"prompt": "x", "completion": "y"}, "label is missing or null"),
        (kto_examples, {"prompt": "x", "completion": "y", "kto_tag": "yes"}, 'kto_tag is "yes"'),
        (kto_examples, {"prompt": "x", "label": True}, "no completion"),
        (kto_examples, {"messages": [assistant("y")], "label": True}, "no prompt"),
        (kto_examples, {"messages": [user("y"), user("z")], "label": True}, "no completion"),
        (kto_examples, {"prompt": "Q", "chosen": [user("R"), assistant("A")], "rejected": QA}, "does not contain the prompt"),
    ],
)  # fmt: skip
def test_malformed_records_name_their_line(parse, record, words):
    with pytest.raises(InputError, match="^d.jsonl:2: .*" + words) as e:
        parse(record, "d.jsonl:2")
    assert not isinstance(e.value, Unusable)


CALL = {"content": None, "role": "assistant", "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    "record, reason, words",
    [
        ({"messages": [user("x"), CALL]}, "tool use", "message 1 .assistant. calls tools"),
        ({"messages": [user("x"), assistant("y", function_call={"name": "f"})]}, "tool use", "tools"),
        ({"messages": [user("x"), {"role": "tool", "content": "y"}]}, "tool use", "message 1 .tool."),
        ({"conversations": [*SHAREGPT, {"from": "observation", "value": "y"}]}, "tool use", "observation"),
        ({"conversations": [*SHAREGPT, {"from": "function_call", "value": "y"}]}, "tool use", "function_call"),
        ({"conversations": SHAREGPT, "tools": '[{"name": "f"}]'}, "tool use", "tools"),
        ({"messages": [user([{"type": "tool_result", "content": "y"}])]}, "tool use", "tool_result"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}])]}, "a part that is not text", "image_url"),
        ({"messages": [user([{"type": "text", "text": "y"}, {"type": "image"}])]}, "a part that is not text", "image"),
        ({"messages": [user([{"type": ["text"], "text": "y"}])]}, "a part that is not text", "text"),
        ({"messages": [user("<image>x"), *QA[1:]], "images": ["a.png"]}, "a part that is not text", "holds images"),
        ({"conversations": SHAREGPT, "image": "a.png"}, "a part that is not text", "holds image"),
        (
            {"prompt": "\n\nHuman: x\n\nAssistant:", "completion": " y"},
            "a transcript as prompt",
            "prompt is a text with Human:",
        ),
        ({"messages": [{"role": "developer", "content": "x"}, *QA]}, "role developer", "developer"),
        ({"messages": [{"role": "critic", "content": "x"}, *QA]}, "unknown role", '"critic"'),
        ({"prompt": "\ud800 a", "completion": "b"}, "garbled text", "message 0 .* half of a surrogate pair"),
        ({"instruction": "a", "output": "b\udc00"}, "garbled text", "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_its_reason(record, reason, words):
    for parse in (dialogues, sft_conversations, kto_examples):
        with pytest.raises(Unusable, match="^d.jsonl:2: .*" + words) as e:
            parse(record, "d.jsonl:2")
        assert e.value.reason == reason


START = [system("S"), user("1"), assistant("a"), user("2")]


@pytest.mark.parametrize("n", range(len(START)))
@pytest.mark.parametrize("m", [0, 1, 3])
def test_a_prompt_and_a_repeated_prompt_are_joined(n, m):
    """The prompt without its first n turns, beside conversations without their first m: no turn is lost."""
    record = {"prompt": START[n:], "chosen": [*START[m:], assistant("b")], "rejected": [*START[m:], assistant("c")]}
    start = START[min(n, m) :]
    assert kto_examples(record, "f:1") == [(start, "b", True), (start, "c", False)]
    assert learnt(record) == ["b"]


def test_a_prompt_beside_whole_transcripts_is_not_said_twice():
    texts = ("\n\nHuman: Q\n\nAssistant: A", "\n\nHuman: Q\n\nAssistant: B")
    record = {"prompt": "Q", "chosen": texts[0], "rejected": texts[1]}
    assert kto_examples(record, "f:1") == [([user("Q")], "A", True), ([user("Q")], "B", False)]


def test_conversations_that_part_early_are_no_pair():
    record = {
        "chosen": [*QA, user("x"), assistant("y")],
        "rejected": [user("Q"), assistant("B"), user("x"), assistant("z")],
    }
    assert learnt(record) == ["y"]
    with pytest.raises(Unusable, match="differ before their last message"):
        kto_examples(record, "f:1")


def test_keys_that_play_no_part_are_known():
    fields = Fields({"prompt": "Q", "chosen": "A", "rejected": "B"})
    sft_conversations(fields, "f:1")
    assert fields.unread == {"rejected"}
    fields = Fields({"prompt": "Q", "chosen": "A", "rejected": "B"})
    kto_examples(fields, "f:1")
    assert not fields.unread
    fields = Fields(
        {
            "messages": [user("Q") | {"name": "Ann"}, assistant("A", reasoning_content="r", weight=1)],
            "id": 7,
            "prompt": "Q",
            "note": None,
        }
    )
    sft_conversations(fields, "f:1")
    assert fields.unread == {"id", "prompt", "messages.name", "messages.reasoning_content"}
    fields = Fields({"prompt": "Q", "completion": [assistant("A", reasoning_content="r")]})
    sft_conversations(fields, "f:1")
    assert fields.unread == {"messages.reasoning_content"}
    fields = Fields({"instruction": "Q", "input": "", "output": "A", "response": "B", "system": "", "history": []})
    sft_conversations(fields, "f:1")
    assert fields.unread == {"response"}


def test_what_pandas_writes_for_null_is_null():
    nan = float("nan")
    record = {"instruction": "Q", "input": nan, "output": "A", "system": nan, "messages": nan, "label": nan}
    assert sft_conversations(record, "f:1") == [[user("Q"), assistant("A")]]
    with pytest.raises(InputError, match="f:1: label is missing or null; it must be true"):
        kto_examples(record, "f:1")
    with pytest.raises(InputError, match="the keys are all null"):
        sft_conversations({"prompt": nan, "messages": None}, "f:1")
