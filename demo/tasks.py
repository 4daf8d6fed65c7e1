"""The table of the demo's tasks. A row has a task's slots, the function that computes the answer, and the phrasings.

To add a task, add a row. demo/world.py turns rows into instructions, references and replies.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from demo import words as W

# fmt: off


class Task(NamedTuple):
    name: str
    category: str
    kind: str                    # kind of reference: number, choice, exact or code
    closed: bool                 # True: a short list of facts, held out by wording; False: held out by slots
    pick: Callable               # rng -> values of the slots, a tuple of strings
    answer: Callable             # values of the slots -> the right reply
    phrasings: tuple             # texts with the slots {a}, {b}, ...


def one_of(*lists: Iterable) -> Callable:
    """A `pick` that draws one entry of every list."""
    return lambda rng: tuple(str(rng.choice(list(entries))) for entries in lists)


def fact(name: str, category: str, table: dict[str, str], *phrasings: str, kind: str = "exact") -> Task:
    return Task(name, category, kind, True, one_of(table), table.__getitem__, phrasings)


def rule(
    name: str, category: str, kind: str, pick: Callable, answer: Callable, *phrasings: str, closed: bool = False
) -> Task:
    return Task(name, category, kind, closed, pick, answer, phrasings)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers of the rows below

def numbers(low: int, high: int, count: int) -> Callable:
    return lambda rng: tuple(str(n) for n in rng.sample(range(low, high + 1), count))


def descending(low: int, high: int) -> Callable:
    return lambda rng: tuple(str(n) for n in sorted(rng.sample(range(low, high + 1), 2), reverse=True))


def shifted(entries: list[str], by: int) -> dict[str, str]:
    return {entry: entries[(i + by) % len(entries)] for i, entry in enumerate(entries)}


def three_steps(rng: random.Random) -> tuple[str, ...]:
    first, step = rng.randint(1, 30), rng.randint(1, 6)
    return tuple(str(first + i * step) for i in range(3))


def odd_one(rng: random.Random) -> tuple[str, ...]:
    kind, other = rng.sample(sorted(set(W.KIND.values())), 2)
    entries = rng.sample([w for w in W.KIND if W.KIND[w] == kind], 3)
    entries.append(rng.choice([w for w in W.KIND if W.KIND[w] == other]))
    return tuple(rng.sample(entries, 4))


def letter_of(entry: str, entries: Sequence[str]) -> str:
    return f"{'ABCD'[entries.index(entry)]}. {entry}"


def odd_one_answer(*entries: str) -> str:
    kinds = [W.KIND[entry] for entry in entries]
    return letter_of(next(e for e, kind in zip(entries, kinds) if kinds.count(kind) == 1), entries)


def four_and(table: dict[str, str]) -> Callable:
    """A `pick` that draws four different values of the table, and the key of one of them."""
    def pick(rng):
        key = rng.choice(list(table))
        others = rng.sample(sorted(set(table.values()) - {table[key]}), 3)
        return *rng.sample([table[key], *others], 4), key
    return pick


def sum_choice(rng: random.Random) -> tuple[str, ...]:
    x, y = rng.randint(1, 20), rng.randint(1, 20)
    return *(str(n) for n in rng.sample([x + y, x + y + 1, x + y + 10, x + y - 1], 4)), str(x), str(y)


def with_article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def yes(condition: bool) -> str:
    return "Yes" if condition else "No"


def add_function(name: str, n: str) -> str:
    return f"```python\ndef {name}(x):\n    return x + {n}\n```"


word, two_words = one_of(W.SHORT), lambda rng: tuple(rng.sample(W.SHORT, 2))
two_names = lambda rng: tuple(rng.sample(W.NAMES, 2))
FOUR = "\nA. {a}\nB. {b}\nC. {c}\nD. {d}"
UNIT = {larger: smaller for larger, (smaller, _) in W.UNIT.items()}
SMALL, LARGE = range(1, 21), range(10, 100)

TASKS = [
    # letters
    rule("copy", "language", "exact", word, lambda a: a,
         'Repeat the word "{a}".', 'Write the word "{a}" once more.', 'Copy this word:\n"{a}"'),
    rule("double", "language", "exact", word, lambda a: f"{a} {a}",
         'Write the word "{a}" twice.', 'Say "{a}" two times.', 'Write this word two times in a row:\n"{a}"'),
    rule("reverse", "language", "exact", word, lambda a: a[::-1],
         'Spell "{a}" backwards.', 'Reverse the word "{a}".', 'Write this word from right to left:\n"{a}"'),
    rule("first_letter", "language", "exact", word, lambda a: a[0],
         'What is the first letter of "{a}"?', 'Which letter does "{a}" begin with?',
         'Give the first letter of the word:\n"{a}"'),
    rule("last_letter", "language", "exact", word, lambda a: a[-1],
         'What is the last letter of "{a}"?', 'Which letter does "{a}" end with?',
         'Give the last letter of the word:\n"{a}"'),
    rule("count_letters", "language", "number", word, lambda a: str(len(a)),
         'How many letters are in "{a}"?', 'Count the letters of "{a}".',
         'How long is this word, in letters?\n"{a}"'),
    rule("contains", "language", "exact", one_of("aeioust", W.SHORT), lambda a, b: yes(a in b),
         'Is there a letter "{a}" in "{b}"?', 'Does "{b}" contain the letter "{a}"?',
         'Can you find "{a}" in the word "{b}"?'),
    rule("join", "language", "exact", two_words, lambda a, b: a + b,
         'Join "{a}" and "{b}" into one word.', 'Write "{a}" and "{b}" without a space.',
         'Put together: "{a}" + "{b}"'),
    rule("alphabet_order", "language", "exact", two_words, lambda a, b: min(a, b),
         'Which word comes first in the dictionary, "{a}" or "{b}"?',
         'Alphabetical order: is it "{a}" or "{b}" that comes first?',
         'Name the earlier word in the alphabet: "{a}", "{b}".'),
    # grammar
    fact("plural", "language", W.PLURAL,
         "What is the plural of {a}?", "Give the plural form of the noun {a}.", "One {a}, two what?",
         "Make this noun plural:\n{a}"),
    fact("past_tense", "language", W.PAST,
         "What is the past tense of {a}?", "Give the simple past of the verb {a}.", "Put the verb {a} into the past.",
         "Today I {a}. Yesterday I what?"),
    fact("antonym", "language", W.ANTONYM,
         "What is the opposite of {a}?", "Give an antonym of {a}.", "Which word means the opposite of {a}?",
         "Write the opposite:\n{a}"),
    fact("synonym", "language", W.SYNONYM,
         "What is another word for {a}?", "Give a synonym of {a}.", "Which word means the same as {a}?",
         "Write a synonym:\n{a}"),
    fact("comparative", "language", W.COMPARATIVE,
         "What is the comparative of {a}?", "Compare two things with the adjective {a}: this one is what?",
         "Give the comparative form of {a}.", "Write the comparative:\n{a}"),
    fact("female", "language", W.FEMALE,
         "What is the female form of {a}?", "Which word names a female {a}?", "Give the feminine of {a}.",
         "Write the feminine form:\n{a}"),
    rule("article", "language", "exact", word, with_article,
         'Put "a" or "an" before {a}.', 'Write {a} with the right article, "a" or "an".',
         "Add the indefinite article to {a}."),
    # knowledge
    fact("capital", "knowledge", W.CAPITAL,
         "What is the capital of {a}?", "Name the capital city of {a}.", "Which city is the capital of {a}?",
         "{a}: what is its capital?"),
    fact("country", "knowledge", W.inverted(W.CAPITAL),
         "{a} is the capital of which country?", "Which country has {a} as its capital?",
         "Name the country whose capital is {a}.",
         "In which country does {a} lie?"),
    fact("continent", "knowledge", W.CONTINENT,
         "On which continent is {a}?", "Name the continent of {a}.", "Which continent does {a} belong to?",
         "{a} lies on which continent?"),
    fact("colour", "knowledge", W.COLOUR,
         "What colour is {a}?", "Name the usual colour of {a}.", "Which colour does {a} have?",
         "The colour of {a} is what?"),
    fact("animal_sound", "knowledge", W.SOUND,
         "What sound does a {a} make?", "Which noise do you hear from a {a}?", "What does the {a} say?",
         "Name the sound of a {a}."),
    fact("young_animal", "knowledge", W.YOUNG,
         "What is a young {a} called?", "Name the young of a {a}.", "How do you call a baby {a}?",
         "A baby {a} is called what?"),
    fact("legs", "knowledge", W.LEGS,
         "How many legs does a {a} have?", "Count the legs of a {a}.", "What is the number of legs of a {a}?",
         "A {a} walks on how many legs?",
         kind="number"),
    fact("worker", "knowledge", W.WORKER,
         "Who {a}?", "What is the job of a person who {a}?", "Name the worker who {a}.",
         "A person {a} at work. What is the job?"),
    # arithmetic
    rule("add", "mathematics", "number", one_of(LARGE, SMALL), lambda a, b: f"{a} + {b} = {int(a) + int(b)}",
         "What is {a} + {b}?", "Add {a} and {b}.", "Calculate the sum of {a} and {b}.", "{a} plus {b} equals what?"),
    rule("subtract", "mathematics", "number", descending(1, 50), lambda a, b: f"{a} - {b} = {int(a) - int(b)}",
         "What is {a} - {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}.", "{a} minus {b} equals what?"),
    rule("multiply", "mathematics",
         "number", one_of(range(2, 13), range(2, 13)), lambda a, b: f"{a} * {b} = {int(a) * int(b)}",
         "What is {a} * {b}?", "Multiply {a} by {b}.", "Calculate the product of {a} and {b}.",
         "{a} times {b} equals what?"),
    rule("larger", "mathematics", "number", numbers(1, 99, 2), lambda a, b: str(max(int(a), int(b))),
         "Which number is larger, {a} or {b}?", "Give the bigger one of {a} and {b}.",
         "Compare {a} with {b} and write the greater number."),
    rule("smallest", "mathematics", "number", numbers(1, 99, 3), lambda a, b, c: str(min(int(a), int(b), int(c))),
         "Which is the smallest of {a}, {b} and {c}?", "Find the minimum of {a}, {b}, {c}.",
         "Write the least number:\n{a} {b} {c}"),
    rule("is_bigger", "mathematics", "exact", numbers(1, 99, 2), lambda a, b: yes(int(a) > int(b)),
         "Is {a} bigger than {b}?", "Yes or no: {a} > {b}?", "Is it true that {a} is more than {b}?"),
    rule("even_odd", "mathematics", "exact", one_of(range(1, 100)), lambda a: "odd" if int(a) % 2 else "even",
         "Is {a} even or odd?", "Is the number {a} odd or even?", "Say whether {a} is an even or an odd number."),
    rule("next_number", "mathematics", "number", three_steps, lambda a, b, c: str(2 * int(c) - int(b)),
         "What comes next: {a}, {b}, {c}, ...?", "Continue the sequence {a}, {b}, {c} by one number.",
         "Write the next number:\n{a} {b} {c}"),
    rule("sort", "mathematics", "exact", numbers(1, 50, 3), lambda *abc: ", ".join(sorted(abc, key=int)),
         "Sort {a}, {b}, {c} from small to large.", "Put {a}, {b} and {c} in ascending order.",
         "Order these numbers, smallest first:\n{a} {b} {c}"),
    rule("round_to_ten", "mathematics",
         "number", one_of([n for n in range(11, 100) if n % 5]), lambda a: str((int(a) + 5) // 10 * 10),
         "Round {a} to the nearest ten.", "Which multiple of ten is nearest to {a}?", "{a} rounded to tens is what?"),
    fact("word_to_number", "mathematics", W.NUMBER,
         "Write {a} in digits.", "Which number is spelled {a}?", "Give the digits for the number word {a}.",
         "Turn this word into digits:\n{a}",
         kind="number"),
    fact("number_to_word", "mathematics", W.inverted(W.NUMBER),
         "Write {a} in words.", "How do you spell the number {a}?", "Give the number word for {a}.",
         "Turn these digits into a word:\n{a}"),
    # time and units
    fact("next_day", "reasoning", shifted(W.DAYS, 1),
         "Which day comes after {a}?", "Today is {a}. What day is tomorrow?", "What day follows {a}?",
         "Name the day after {a}."),
    fact("next_month", "reasoning", shifted(W.MONTHS, 1),
         "Which month comes after {a}?", "What month follows {a}?", "It is {a}. Which month is next?",
         "Name the month after {a}."),
    fact("month_number", "reasoning", {month: str(i + 1) for i, month in enumerate(W.MONTHS)},
         "What number has the month {a}?", "Which month of the year is {a}, as a number?",
         "Write {a} as the number of a month.", kind="number"),
    rule("convert", "reasoning", "number", lambda rng: (str(rng.randint(2, 9)), *rng.choice(list(UNIT.items()))),
         lambda a, b, c: f"{int(a) * W.UNIT[b][1]} {W.UNIT[b][0]}",
         "How many {c} are in {a} {b}?", "Convert {a} {b} to {c}.", "{a} {b} make how many {c}?", closed=True),
    rule("clock", "reasoning",
         "exact", one_of(range(1, 13), range(1, 7)), lambda a, b: f"{(int(a) + int(b) - 1) % 12 + 1} o'clock",
         "It is {a} o'clock. What time is it in {b} hours?",
         "A train leaves at {a} o'clock and travels {b} hours. When does it arrive?",
         "What time is {b} hours after {a} o'clock?", closed=True),
    # reasoning
    rule("word_problem", "reasoning",
         "number", lambda rng: (rng.choice(W.NAMES), str(rng.randint(2, 30)), str(rng.randint(2, 9))),
         lambda a, b, c: f"{b} + {c} = {int(b) + int(c)}",
         "{a} has {b} apples and gets {c} more. How many apples does {a} have now?",
         "There are {b} books on the desk. {a} brings {c} more books. How many books are there?",
         "{a} walks {b} km on the first day and {c} km on the second. How many km in all?"),
    rule("taller", "reasoning", "exact", two_names, lambda a, b: b,
         "{a} is taller than {b}. Who is shorter?", "{b} is younger than {a}. Who is the younger one, {a} or {b}?",
         "{a} runs faster than {b}. Who loses the race?"),
    rule("odd_one_out", "reasoning", "choice", odd_one, odd_one_answer,
         "Which word does not belong with the others?" + FOUR, "Find the odd one out." + FOUR,
         "Three of these are alike. Which one is not?" + FOUR),
    rule("capital_choice", "reasoning",
         "choice", four_and(W.CAPITAL), lambda *abcde: letter_of(W.CAPITAL[abcde[4]], abcde[:4]),
         "Choose the capital of {e}." + FOUR, "Which of these is the capital of {e}?" + FOUR,
         "Pick the right answer. The capital of {e} is:" + FOUR),
    rule("sum_choice", "reasoning",
         "choice", sum_choice, lambda a, b, c, d, e, f: letter_of(str(int(e) + int(f)), (a, b, c, d)),
         "Choose the value of {e} + {f}." + FOUR, "Which of these is {e} + {f}?" + FOUR,
         "Pick the right answer. {e} plus {f} is:" + FOUR),
    # Chinese
    fact("to_chinese", "language", W.CHINESE,
         "Translate {a} into Chinese.", "How do you say {a} in Chinese?", "把{a}翻译成中文。", "{a}用中文怎么说?"),
    fact("to_english", "language", W.inverted(W.CHINESE),
         "Translate {a} into English.", "What does {a} mean in English?", "把{a}翻译成英文。", "{a}用英语怎么说?"),
    fact("zh_antonym", "language", W.ZH_ANTONYM, "“{a}”的反义词是什么?", "写出“{a}”的反义词。", "和“{a}”意思相反的字是哪个?",
         "请给“{a}”找一个反义词。"),
    fact("zh_capital", "language", W.ZH_CAPITAL, "{a}的首都是哪里?", "请写出{a}的首都。", "哪个城市是{a}的首都?", "{a}的首都叫什么?"),
    fact("zh_colour", "language", W.ZH_COLOUR, "{a}是什么颜色的?", "写出{a}的颜色。", "{a}通常是哪种颜色?", "请问{a}的颜色是什么?"),
    rule("zh_add", "language", "number", one_of(SMALL, SMALL), lambda a, b: f"{a}+{b}={int(a) + int(b)}",
         "{a}加{b}等于几?", "计算{a}加{b}。", "{a}与{b}的和是多少?"),
    # code
    rule("add_function", "code", "code", one_of(["add", "plus", "inc", "shift", "grow",
         "bump"], range(1, 40)), add_function,
         "Write a Python function {a}(x) that adds {b} to x.", "Define {a}(x) in Python: it returns x plus {b}."),
]
RARE = [  # tasks too rare for make_data.py's --min-category; not in the held-out set
    fact("planet", "knowledge", W.PLANET, "Counted from the sun, which number is {a}?", kind="number"),
    fact("roman", "mathematics", W.ROMAN, "Write {a} in Roman numerals."),
    fact("element", "knowledge", W.SYMBOL, "What is the chemical symbol of {a}?"),
]
