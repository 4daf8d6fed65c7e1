"""IFEval's checks against lm-evaluation-harness' own, where lm_eval, langdetect, immutabledict and NLTK's punkt_tab are.

The checks of language are compared on clear sentences: langdetect guesses short texts at random. As a command,
PYTHONPATH=. python tests/parity/test_ifeval_harness.py --data-dir D --samples OUT/samples.jsonl, it compares all replies
of an evaluation and prints the disagreements of each kind of instruction.
"""

import argparse
import collections
import importlib.util
import json
import logging
import random

import pytest

from verification.ifeval import count_capital_words, count_sentences, follows

LESS, AT_LEAST = {"relation": "less than"}, {"relation": "at least"}
INSTRUCTIONS = [
    ("keywords:existence", {"keywords": ["dog", "Day"]}),
    ("keywords:frequency", {"keyword": "dog ", "frequency": 2, **AT_LEAST}),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "go on"]}),
    ("keywords:letter_frequency", {"letter": "D", "let_frequency": 4, "let_relation": "less than"}),
    ("language:response_language", {"language": "en"}),
    ("length_constraints:number_sentences", {"num_sentences": 3, **LESS}),
    ("length_constraints:number_sentences", {"num_sentences": 4, **AT_LEAST}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"num_words": 12, **LESS}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "The"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "The dog is in the house."}),
    ("startend:end_checker", {"end_phrase": "in the house."}),
    ("startend:quotation", {}),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("punctuation:no_comma", {}),
]
REPLIES = [
    "The dog is in the house.",
    "The dog, the cat and the other animals are in the house today. Dogs like the house. It is a good day!",
    "the dog is in the house and it is not going to leave before the end of the day.",
    "THE OTHER ANIMALS OF THE FARM ARE IN THE HOUSE WITH A DOG, AND THEY LIKE IT THERE ON SUNDAYS.",
    '"The weather is good, and the dog is in the house."',
    "Sure, here is what you asked for:\n\n* The dog is in the house.\n* The cat is in the garden.\n\nThe end of the list.",
    "- The first point is about the dog.\n  - the second about the day\n\n**The third** is *not* a point, **it is bold**.",
    "1. The dog is in the house.\n2. The cat is out.\n3. **Go on.** They like it.\n4. the last one",
    "<<A dog's day>>\n\nThe dog is in the house. P.S. The cat is not. p. p. s. It is in the garden.",
    "Section 1\nThe dog is in the house.\nSection 2\nThe cat is in the garden with [name] and [address].",
    "The dog is in the house.\n***\nThe cat is in the garden.",
    "The dog is in the house.\n******\nThe cat is in the garden.",
    '```json\n{"dog": "The dog is in the house", "cat": ["it is in the garden"]}\n```',
    "My answer is yes. The dog is in the house.",
]
TEXTS = [
    "One. Two! Three?", "No end", "Wait... what?!", "Hi!!! You.", "Mr. Brown came. He left.", "It cost 3.5 dollars. Fine.",
    'He said "Go." Then he left.', "1. One thing.\n2. **Two** things.\n3. three things", "e.g. this one. And that.",
    "etc. and so on", "So do I. You too.", "visit example.com now", "He came at 3.5 p.m. today", "He came at 3 p.m. The end",
    "**Go.**\n\nNow.", "**Go.**", "(Go.) Now.", "Go (now). Then", "It was in the U.S. Then he left", "Yes… No. [a.] b",
    "Plan C. Then [b.] it", "Plan A. It", "NASA'S plan", "AND/OR the U.S. now", "IT CANNOT GO", "I'm GONNA go, OK?",
    "“GO ON.” He went.", "A-B: C", "Dr. WHO? Me.",
]  # fmt: skip


def official_checker():
    """-> lm_eval.tasks.ifeval.utils, with langdetect made repeatable. Skips where one of its parts is missing."""
    for name in ("lm_eval", "langdetect", "immutabledict", "nltk"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    import langdetect
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("NLTK's punkt_tab is not installed")
    from lm_eval.tasks.ifeval import utils

    langdetect.DetectorFactory.seed = 0
    logging.getLogger("lm_eval.tasks.ifeval.instructions").disabled = True  # it logs every text without letters
    return utils


def both_verdicts(utils, instructions: list[tuple], reply: str) -> list[tuple]:
    """-> (instruction, "strict" or "loose", our verdict, the official one), for each instruction"""
    names, kwargs = [list(column) for column in zip(*instructions)]
    asked, found = utils.InputExample(0, names, "", kwargs), []
    random.seed(0)  # the checker draws a letter where the instruction names another character
    for rules in ("strict", "loose"):
        official = getattr(utils, f"test_instruction_following_{rules}")(asked, reply).follow_instruction_list
        ours = [follows(name, reply, arguments, loose=rules == "loose") for name, arguments in instructions]
        found += zip(names, [rules] * len(names), ours, official)
    return found


@pytest.mark.parametrize("reply", REPLIES, ids=range(len(REPLIES)))
def test_every_instruction(reply):
    found = both_verdicts(official_checker(), INSTRUCTIONS, reply)
    assert [row for row in found if row[2] != row[3]] == []
    assert len({row[3] for row in found}) == 2  # some are followed, some are not


def test_counts():
    official_checker()
    import nltk
    from lm_eval.tasks.ifeval import instructions_util

    for text in TEXTS:
        assert count_sentences(text) == instructions_util.count_sentences(text), text
        assert count_capital_words(text) == sum(word.isupper() for word in nltk.word_tokenize(text)), text


def compare_samples(data_dir: str, files: list[str]) -> None:
    """Prints the disagreements of both checkers on all replies in samples.jsonl files."""
    from evaluation.benchmarks import BENCHMARKS
    from evaluation.downloads import find_data_file

    utils = official_checker()
    rows = {row["id"]: row for row in BENCHMARKS["ifeval"]["rows"](lambda name: find_data_file(data_dir, name))}
    counts, prompts, replies = collections.Counter(), collections.Counter(), 0
    for path in files:
        with open(path, encoding="utf-8") as f:
            samples = [json.loads(line) for line in f]
        for sample in samples:
            row, replies = rows[sample["id"]], replies + 1
            found = both_verdicts(utils, list(zip(row["instruction_id_list"], row["kwargs"])), sample["reply"])
            for name, rules, ours, official in found:
                counts[name, rules] += 1
                counts[name, rules, "differ"] += ours != official
            for rules in ("strict", "loose"):
                ours, official = zip(*[pair[2:] for pair in found if pair[1] == rules])
                prompts[rules] += all(ours) != all(official)
                prompts[rules, "ours"] += all(ours)
                prompts[rules, "official"] += all(official)
    print(f"{'instruction':45} {'n':>5} {'strict':>6} {'loose':>6}")
    for name in sorted({key[0] for key in counts}):
        differ = [counts[name, rules, "differ"] for rules in ("strict", "loose")]
        print(f"{name:45} {counts[name, 'strict']:5} {differ[0]:6} {differ[1]:6}")
    print(f"{'all instructions of a prompt':45} {replies:5} {prompts['strict']:6} {prompts['loose']:6}")
    for rules in ("strict", "loose"):
        print(f"{rules}: ours {prompts[rules, 'ours']}, official {prompts[rules, 'official']} of {replies} followed")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="compare IFEval's verdicts with lm-evaluation-harness' on kept replies")
    p.add_argument("--data-dir", required=True, help="folder of the benchmarks")
    p.add_argument("--samples", nargs="+", required=True, help="samples.jsonl files of eval.py --tasks ifeval")
    args = p.parse_args()
    compare_samples(args.data_dir, args.samples)
