"""demo/split.py: what is trained on, what chooses and what is tested share no instruction."""

import pytest

from core.files import InputError
from demo import split, teacher, world
from demo.tasks import TASKS


def curated(n=900):
    """Rows as make_data.py writes them: sft.jsonl with right replies but every tenth, kto.jsonl with both replies."""
    sft, kto = [], []
    for i, source in enumerate(world.make_sources(3, n, world.make_heldout())):
        text = source.get("instruction") or source.get("prompt") or source["messages"][0]["content"]
        text += "\n" * bool(source.get("input")) + source.get("input", "")
        item = teacher.parse_loosely(text)
        if item is None:
            continue
        prompt, row = [{"role": "user", "content": text}], {"id": f"f:{i}"}
        reply = world.right(item) if i % 10 else world.slip(item)
        sft.append({**row, "messages": [*prompt, {"role": "assistant", "content": reply}]})
        for label, content in (True, world.right(item)), (False, world.slip(item)):
            kto.append(
                {**row, "prompt": prompt, "completion": [{"role": "assistant", "content": content}], "label": label}
            )
    return sft, kto[:-1]


def scored():
    """Rows as make_data.py's step 6 writes them, of the instructions of curated(): three replies, two of them equal."""
    rows = []
    for row in curated()[0]:
        reply = row["messages"][1]["content"]
        grades = {"original": (reply + "?", 2), "teacher": (reply, 5), "small": (reply, 5)}
        responses = {writer: {"text": text, "quality": quality} for writer, (text, quality) in grades.items()}
        rows.append({"id": row["id"], "prompt": row["messages"][:1], "responses": responses})
    return rows


@pytest.fixture(scope="module")
def divided():
    return split.divide(*curated(), scored(), 40, 10, 0)


def items(rows):
    return [teacher.parse_loosely(split.user_text(row)) for row in rows]


def test_no_instruction_is_in_two_parts(divided):
    files, parts = divided
    trained = items(files["sft.jsonl"]) + items(files["pairs.jsonl"])
    prompts = [{item.prompt for item in part} for part in (trained, *parts.values())]
    assert all(prompts) and sum(map(len, prompts)) == len(set.union(*prompts))
    keys = {world.item_key(item) for item in trained}
    assert not keys & {world.item_key(item) for item in parts["test"]}


def test_withheld_tasks_are_not_trained_on_and_not_in_the_other_questions(divided):
    files, parts = divided
    names = {item.task.name for item in parts["withheld"]}
    assert names == set(split.WITHHELD) <= {task.name for task in TASKS} and len(parts["withheld"]) == 10 * len(names)
    others = items(files["sft.jsonl"]) + items(files["pairs.jsonl"]) + parts["validation"] + parts["test"]
    assert not names & {item.task.name for item in others}
    assert len(parts["test"]) == sum(item.task.name not in names for item in world.make_heldout().values())


def test_the_validation_file_holds_the_validation_questions(divided):
    files, parts = divided
    assert len(parts["validation"]) == 40
    assert {item.prompt for item in items(files["validation.jsonl"])} == {item.prompt for item in parts["validation"]}


def test_only_right_replies_have_a_reference(divided):
    for row in divided[0]["sft.jsonl"]:
        right = row["messages"][-1]["content"] == world.right(teacher.parse_loosely(split.user_text(row)))
        code = teacher.parse_loosely(split.user_text(row)).task.kind == "code"
        assert ("reference" in row) == (right and not code), row


def test_pairs_have_both_replies_to_one_prompt(divided):
    sft, kto = curated()
    pairs = divided[0]["pairs.jsonl"]
    by_prompt = {(row["prompt"][0]["content"], row["label"]): row["completion"] for row in kto}
    for pair in pairs:
        text = split.user_text(pair)
        assert (pair["chosen"], pair["rejected"]) == (by_prompt[text, True], by_prompt[text, False])
    assert len(pairs) >= len(divided[0]["sft.jsonl"]) - 1  # the last row of kto.jsonl has lost its partner


def test_groups_are_of_the_trained_instructions_and_hold_each_reply_once(divided):
    files, _ = divided
    assert {split.user_text(row) for row in files["groups.jsonl"]} == {
        split.user_text(row) for row in files["sft.jsonl"]
    }
    for group in files["groups.jsonl"]:
        first, second = group["completions"]
        assert first == second + "?" and group["rewards"] == [2.0, 5.0]


def test_too_few_instructions(tmp_path):
    sft, kto = curated(60)
    with pytest.raises(InputError, match="--validation 500"):
        split.divide(sft, kto, [], 500, 10, 0)
