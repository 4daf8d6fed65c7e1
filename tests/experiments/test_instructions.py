"""experiments.instructions: every constraint can be followed and can be broken; splits share no topic; the seed decides."""

import json
import random

import pytest

from experiments.instructions import ALONE, FORMS, NAMES, SECOND, TOPICS, constraint, instruction, write_instructions
from verification.ifeval import follows

PLAIN = (
    "Rain falls, and the small old world at home is quiet"  # follows none of the constraints but the shortest length
)


def fulfil(name, kwargs):
    """A reply that is made to follow a constraint."""
    return {
        "keywords:existence": lambda: f"We write {' and '.join(kwargs['keywords'])}.",
        "keywords:forbidden_words": lambda: "Water falls on roofs.",
        "keywords:frequency": lambda: f"{kwargs['keyword']} " * kwargs["frequency"],
        "length_constraints:number_words": lambda: "word " * (kwargs["num_words"] - 1),
        "length_constraints:number_sentences": lambda: "It rains. " * kwargs["num_sentences"],
        "detectable_format:number_bullet_lists": lambda: "* a point\n" * kwargs["num_bullets"],
        "detectable_format:number_highlighted_sections": lambda: "*a part* and " * kwargs["num_highlights"],
        "detectable_format:title": lambda: "<<Rain>>\nIt falls.",
        "detectable_format:json_format": lambda: '{"rain": "falls"}',
        "startend:end_checker": lambda: f"It rains. {kwargs['end_phrase']}",
        "startend:quotation": lambda: '"It rains."',
        "change_case:english_capital": lambda: "THE RAIN IS IN THE CLOUDS.",
        "change_case:english_lowercase": lambda: "the rain is in the clouds.",
        "punctuation:no_comma": lambda: "It rains.",
        "detectable_content:postscript": lambda: "It rains.\nP.S. It falls.",
    }[name]()


def break_it(name, kwargs):
    """A reply that misses a constraint by little."""
    return {
        "keywords:existence": lambda: f"We write {kwargs['keywords'][0]}.",
        "keywords:forbidden_words": lambda: "The rain falls.",
        "keywords:frequency": lambda: f"{kwargs['keyword']} " * (kwargs["frequency"] - 1),
        "length_constraints:number_words": lambda: "word " * kwargs["num_words"],
        "length_constraints:number_sentences": lambda: "It rains. " * (kwargs["num_sentences"] - 1),
        "detectable_format:number_bullet_lists": lambda: "* a point\n" * (kwargs["num_bullets"] + 1),
        "detectable_format:number_highlighted_sections": lambda: "*a part* and " * (kwargs["num_highlights"] - 1),
        "startend:end_checker": lambda: f"{kwargs['end_phrase']} It rains.",
        "startend:quotation": lambda: '"It rains.',
    }.get(name, lambda: PLAIN)()


@pytest.mark.parametrize("name", NAMES)
def test_a_constraint_is_followed_and_broken(name):
    for seed in range(20):
        sentence, kwargs = constraint(name, random.Random(seed))
        assert follows(name, fulfil(name, kwargs), kwargs), sentence
        assert not follows(name, break_it(name, kwargs), kwargs), sentence


def test_the_sentence_names_what_the_check_asks():
    for name, key in [
        ("length_constraints:number_words", "num_words"), ("length_constraints:number_sentences", "num_sentences"),
        ("detectable_format:number_bullet_lists", "num_bullets"), ("keywords:frequency", "frequency"),
        ("detectable_format:number_highlighted_sections", "num_highlights"), ("startend:end_checker", "end_phrase"),
    ]:  # fmt: skip
        for seed in range(10):
            sentence, kwargs = constraint(name, random.Random(seed))
            assert str(kwargs[key]) in sentence


def test_an_instruction_has_one_or_two_different_constraints():
    sizes = set()
    for seed in range(200):
        row = instruction("rain", random.Random(seed))
        names = row["instruction_id_list"]
        sizes.add(len(names))
        assert len(set(names)) == len(names) == len(row["kwargs"]) and "rain" in row["prompt"]
        if len(names) == 2:
            assert names[0] not in ALONE and names[1] in SECOND
    assert sizes == {1, 2}


def read(folder, name):
    return [json.loads(line) for line in open(folder / name / "ifeval" / "input_data.jsonl")]


def topics_of(rows):
    """The topics that the rows' forms were filled with."""
    asked = {form.format(topic): topic for form in FORMS for topic in TOPICS}
    found = [next(topic for start, topic in asked.items() if row["prompt"].startswith(start)) for row in rows]
    return set(found)


def test_splits_share_no_topic_and_no_key(tmp_path):
    write_instructions(str(tmp_path), {"train": 60, "dev": 30, "test": 60}, seed=0)
    rows = {name: read(tmp_path, name) for name in ("train", "dev", "test")}
    assert {name: len(some) for name, some in rows.items()} == {"train": 60, "dev": 30, "test": 60}
    keys = [row["key"] for some in rows.values() for row in some]
    assert len(set(keys)) == len(keys)
    prompts = [row["prompt"] for some in rows.values() for row in some]
    assert len(set(prompts)) == len(prompts)
    found = [topics_of(some) for some in rows.values()]
    assert all(found) and not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])


def test_the_seed_decides_every_byte(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_instructions(str(tmp_path / folder), {"train": 20, "dev": 5}, seed)
    text = lambda folder: (tmp_path / folder / "train/ifeval/input_data.jsonl").read_bytes()
    assert text("a") == text("b") != text("c")
