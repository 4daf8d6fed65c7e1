"""Removes a model's thought from its reply. A thought is neither an answer to check nor text to train on."""

import re

TAGS = {  # {opening: closing}
    "<think>": "</think>",  # DeepSeek-R1, Qwen3
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi
    "<|begin_of_thought|>": "<|end_of_thought|>",  # Sky-T1
}
OPENING, CLOSING = ("|".join(map(re.escape, tags)) for tags in (TAGS, TAGS.values()))
THOUGHT = "|".join(rf"{re.escape(opening)}.*?(?:{re.escape(closing)}|\Z)" for opening, closing in TAGS.items())
LEADING = re.compile(rf"(?:\s*(?:{THOUGHT}))+\s*", re.IGNORECASE | re.DOTALL)
# The end of a thought whose opening tag is in the prompt, as in DeepSeek-R1's template. The closing tag begins or ends
# its line, so that a sentence may mention a tag
OPENED_BEFORE = re.compile(
    rf"(?:(?!{OPENING}).)*?(?:^[ \t]*(?:{CLOSING})|(?:{CLOSING})[ \t]*\n)\s*", re.IGNORECASE | re.DOTALL | re.MULTILINE
)


def without_thought(reply: str) -> str:
    """A reply without the thought before its answer: "<think>2 + 2?</think>\\n\\n4" -> "4".

    "" if the thought has no end, because the reply was cut off. A reply without a thought is returned unchanged.
    """
    found = LEADING.match(reply) or OPENED_BEFORE.match(reply)
    return reply[found.end() :] if found else reply
