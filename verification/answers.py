"""Extracts the answer from a reply and checks it: numbers, choices, strings, and code, which sandbox.py runs.

The rules are those of the paper's evaluation scripts (arXiv 2411.02939, companion repository), which are Qwen's own.
Their oddities are kept, because they are part of the protocol: other rules give other scores.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

from core.files import InputError, shown
from core.records import is_number
from verification.ifeval import follows
from verification.sandbox import run_program
from verification.thoughts import without_thought

# ---------------------------------------------------------------------------------------------------------------------
# Numbers

NUMBER = re.compile(r"[+-]?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|[+-]?\.[0-9]+")


def last_number(text: str) -> float | None:
    """The last number in a text. None if there is none.

    Commas between thousands are dropped ("$1,234.50" -> 1234.5). Currencies and units are ignored ("50%", "18 元"). A
    sign directly before the digits belongs to the number, as in the protocol ("-5", but also "10-12" -> -12).
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def numbers_equal(a: float | None, b: float | None, tol: float = 1e-4) -> bool:
    """True if two numbers differ by at most tol (absolute). None equals nothing."""
    return a is not None and b is not None and math.isclose(a, b, rel_tol=0, abs_tol=tol)


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice


@functools.lru_cache
def choice_patterns(letters: str) -> list[re.Pattern]:
    """The protocol's patterns for a string of letters ("ABCD"), in the order to try them. Group 1 is the letter.

    `gap` is text without any of the letters, so no match crosses a letter. Statements ("the answer is B") and
    judgements ("B is correct") have a Chinese and an English pattern each. A negation between the words and the letter
    prevents the match. The paper's scripts use only the Chinese patterns for C-Eval and only the English ones for
    CMMLU. Here both are tried.
    """
    x, gap = f"([{letters}])", f"[^{letters}]"
    not_en = rf"(?!{gap}{{0,20}}?(?:n't|not))"
    states_en = rf"(?:[Cc]hoose|(?:[Aa]nswer|[Cc]hoice){not_en}{gap}{{0,10}}?\b(?:is|be|:|)\b){gap}{{0,20}}?\b{x}\b"
    verb = "(?:是|选|为|：|:|】)"
    not_zh = rf"(?!{gap}{{0,10}}?(?:不|非){gap}{{0,10}}?{verb})"
    states_zh = (
        rf"(?:选[择定]?[：:]?\s*|(?:答案|选项){not_zh}{gap}{{0,10}}?{verb}{gap}{{0,10}}?)"
        rf"{x}(?:选项)?(?:[)）。.．，,、：:{letters}]|$)"
    )
    right_en = r"\b(?:correct|right)\b"
    called_en = rf"\b{x}\b(?!{gap}{{0,8}}?(?:n't|not){gap}{{0,5}}?(?:correct|right)){gap}{{0,10}}?{right_en}"
    right_zh = "(?:正确|对[的，。：]|符合)"
    called_zh = rf"{x}(?:选?项)?(?!{gap}{{0,4}}?(?:不|非){gap}{{0,4}}?{right_zh}){gap}{{0,4}}?{right_zh}"
    opens = rf"^[(（]?{x}(?:[)）。.．，,：:]|$)"
    alone = rf"(?<![a-zA-Z]){x}(?![a-zA-Z=])"
    return [re.compile(p) for p in (states_zh, states_en, called_zh, called_en, opens, alone)]


def extract_choice(reply: str, choices: dict[str, str], question: str | None = None) -> str:
    """The letter that a reply chooses. Always returns a letter.

    choices: {letter: text}. Three steps, as in the protocol. First, each choice's text in the reply is replaced by its
    letter, the longest text first. A text of one character is also replaced inside words. Then choice_patterns() are
    tried in order. If none matches, nearest_choice() decides.

    question: for C-Eval only. Its scripts also replace a repeated stem of the question ("...的特性是____") by 答案是, and
    match the choices' texts case-sensitively.
    """
    if question is not None:
        stem = question.rstrip("。").split("。")[-1].split("_")
        if len(stem[0].strip()) > 4:
            reply = reply.replace(stem[0], "答案是")
        if len(stem[-1].strip()) > 4:
            reply = reply.replace(stem[-1], "")
    flags = re.IGNORECASE if question is None else 0
    for letter, text in sorted(choices.items(), key=lambda item: len(item[1]), reverse=True):
        if text := text.rstrip(".。"):  # an empty text would match between all characters
            reply = re.sub(re.escape(text), letter, reply, flags=flags)
    for pattern in choice_patterns("".join(choices)):
        if found := pattern.search(reply):
            return found.group(1)
    return nearest_choice(reply, choices)


def nearest_choice(reply: str, choices: dict[str, str]) -> str:
    """The letter whose text is most similar to the reply. Of equally similar texts the first one."""
    # rounded, so that equal similarities are equal numbers
    similarities = {letter: round(similarity(reply, text), 9) for letter, text in choices.items()}
    return max(similarities, key=similarities.get)


def similarity(a: str, b: str) -> float:
    """The similarity of two texts, 0 to 1: thefuzz's "weighted ratio", which the paper's scripts use.

    Texts of similar length are compared as they are and as bags of words. Otherwise the shorter text is compared with
    the best-matching part of the longer one, and one shared word counts as a match, both at a discount.
    """
    a, b = (re.sub(r"[\W_]", " ", text).strip().lower() for text in (a, b))
    if not a or not b:
        return 0.0
    words_a, words_b = set(a.split()), set(b.split())
    length = max(len(a), len(b)) / min(len(a), len(b))
    if length < 1.5:
        both, rest_a, rest_b = words_a & words_b, words_a - words_b, words_b - words_a
        if both and not (rest_a and rest_b):
            return max(lcs_ratio(a, b), 0.95)
        bags = [" ".join(sorted(both) + sorted(rest)) for rest in (rest_a, rest_b)]
        pairs = [bags, [" ".join(sorted(text.split())) for text in (a, b)]]
        pairs += [[" ".join(sorted(both)), bag] for bag in bags if both]
        return max(lcs_ratio(a, b), 0.95 * max(lcs_ratio(*pair) for pair in pairs))
    discount = 0.9 if length <= 8 else 0.6
    place = 1.0 if words_a & words_b else 0.0
    if not place:
        place = max(best_partial_ratio(*(" ".join(sorted(f(t.split()))) for t in (a, b))) for f in (list, set))
    return max(lcs_ratio(a, b), discount * best_partial_ratio(a, b), discount * 0.95 * place)


def lcs_ratio(a: str, b: str) -> float:
    """2 LCS(a, b) / (|a| + |b|). LCS is the length of the longest common subsequence."""
    return 2 * lcs_length(a)(b) / (len(a) + len(b))


def lcs_length(a: str) -> Callable[[str], int]:
    """-> a function b -> LCS(a, b), the length of the longest common subsequence.

    Bit-parallel: each character of b updates one row of the dynamic-programming table. Bit i of `row` is 0 if a[i]
    raises the length.
    """
    masks, full = {}, (1 << len(a)) - 1
    for i, character in enumerate(a):
        masks[character] = masks.get(character, 0) | 1 << i

    def length(b: str) -> int:
        row = full
        for character in b:
            hit = row & masks.get(character, 0)
            row = (row + hit | row - hit) & full
        return len(a) - row.bit_count()

    return length


def best_partial_ratio(a: str, b: str) -> float:
    """The largest lcs_ratio of the shorter text with any window of the longer one.

    A window is as long as the shorter text. Windows at the two ends may be shorter.
    """
    if len(a) > len(b):
        a, b = b, a
    n, length = len(a), lcs_length(a)
    edges = [b[:i] for i in range(1, n)] + [b[-i:] for i in range(1, n)]
    best = max((2 * length(piece) / (n + len(piece)) for piece in edges), default=0.0)
    most = i = 0
    while i <= len(b) - n:
        found = length(b[i : i + n])
        most = max(most, found)
        i += most - found + 1  # the LCS changes by at most 1 per position, so no skipped window is better
    return max(best, most / n)


# ---------------------------------------------------------------------------------------------------------------------
# Code

INDENTED = r"(.*?)(?=\n(?!\n*(?:  |\t))|\Z)"  # up to the first line that is not indented


def extract_code(reply: str, entry_point: str) -> str:
    """The body of the function `entry_point` in a reply. It continues a prompt that ends with the function's signature.

    Looks for the function in a fenced block, then anywhere in the reply, then takes any function. In a block, the text
    up to its end is taken, with helpers after the function. A reply without a function is taken as the body and
    indented.
    """
    name = re.escape(entry_point)
    fenced, bare = rf"```.*?def\s+{name}\b.*?:\n(.*?)\n```", rf"def\s+{name}\b.*?:\n{INDENTED}"
    for pattern in (fenced, bare, rf"def.*?:\n{INDENTED}"):
        if found := re.search(pattern, reply, re.DOTALL):
            return found.group(1)
    return "".join(f"    {line}" if line.strip() else line for line in reply.splitlines(keepends=True))


def extract_program(reply: str, entry_point: str | None = None) -> str:
    """The program in a reply: the first fenced block that defines entry_point, else the first block, else the reply."""
    blocks = re.findall(r"```[^\n]*\n(.*?)(?:\n```|\Z)", reply, re.DOTALL)
    named = [b for b in blocks if entry_point and re.search(rf"def\s+{re.escape(entry_point)}\b", b)]
    return (named or blocks or [reply])[0]


def tested_function(code: str, tests: str) -> str | None:
    """The last function of a program that its tests mention, None if they mention none."""
    names = re.findall(r"def\s+(\w+)", code)
    return next((name for name in reversed(names) if re.search(rf"\b{name}\b", tests)), None)


def last_boxed(reply: str) -> str | None:
    """The content of the last \\boxed{...} in a reply, without LaTeX's \\text. None if there is no box."""
    found = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", reply)
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", found[-1]).strip() if found else None


# ---------------------------------------------------------------------------------------------------------------------
# Stated answers: strict rules, for verifying data


@functools.lru_cache
def choice_statements(letters: str) -> list[re.Pattern]:
    """Patterns of a stated choice, the most reliable first. Group 1 is the letter.

    A single letter may be an article ("The answer is A man"), so only a few words may follow it, and no second letter.
    """
    second = rf"(?![)）]?\s*(?:,|、|/|&|and|or|和|或|及|与)\s*[(（]?[{letters}](?![A-Za-z]))"
    article = r"(?!\s+(?!(?:is|was|because|since|as|which|with)\b)[a-z])"
    x = rf"[\s:：*_\\(（\[【“\"$]*(?:[Oo]ption |[Cc]hoice |选项)?[*(（]*([{letters}])(?![A-Za-z'’=^_]){article}{second}"
    is_en, is_zh = r"[\s*_]*(?:is|:|(?:must|should|would|will) be)", r"(?:应该?|应当|就|只能)?(?:是|为|选|：|:|】)"
    refused = "".join(f"(?<!{no})" for no in ("不", "不应", "不能", "不该", "不应该", "可", "别"))
    patterns = (
        rf"(?:\b(?:[Aa]nswer|ANSWER|[Cc]hoice|[Oo]ption){is_en}|(?:答案|选项){is_zh}){x}",
        rf"(?<!not )(?<!n't )(?:\b(?:[Cc]hoose|[Ss]elect|[Pp]ick)\b|{refused}选[择定]?(?!项)){x}",
        rf"(?<![A-Za-z])([{letters}])[)）*]*(?: (?:is|was) (?:the )?(?:correct|right)\b|(?:选?项)?(?:是正确|正确|符合))",
    )
    return [re.compile(pattern) for pattern in patterns]


def strip_latex(text: str) -> str:
    """A text in lower case without LaTeX's commands and braces. A fraction becomes "1/2"."""
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r" \1/\2", text).replace("\\sqrt", "√").replace("\\pi", "π")
    return re.sub(r"\\(?:text(?:bf)?|math(?:rm|bf)|left|right)\b|[\\{}$]|\.\s*\Z", " ", text).strip().casefold()


def normalise_latex(text: str) -> str:
    """A text without LaTeX, spaces, case and "^" after a letter: "24a^{2} \\text{ Cm}" -> "24a2cm"."""
    return re.sub(r"\s|(?<=[a-z])\^", "", re.sub(r"\^\s+", "^", strip_latex(text)))


def parse_quantity(text: str) -> float | None:
    """The value of a text that is one number, with or without a unit ("$2,000", "7 1/2 sec"). Else None ("8^6 ways")."""
    number = r"(-?)(?:(\d+)\s+(?=\d+/))?(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/([1-9]\d*))?"
    unit = r"\s*(?:[%°]|\s[a-z./ %²³]+|[a-z]{2,}[a-z./ ²³]*)?"
    if not (found := re.fullmatch(rf"(?:rs\.?|[€£])?\s*{number}{unit}", strip_latex(text))):
        return None
    sign, whole, value, below = found.groups()
    return (-1 if sign else 1) * (int(whole or 0) + float(value.replace(",", "")) / int(below or 1))


def stated_number(text: str) -> float | None:
    """The value of a text that is one number, else the last number in it. None if there is none.

    Reads fractions, unlike last_number(): "\\frac{1}{2}" and "1/2" are 0.5.
    """
    value, found = parse_quantity(text), re.findall(rf"({NUMBER.pattern})(?:/([1-9][0-9]*))?", text)
    if value is None and found:
        value = float(found[-1][0].replace(",", "")) / int(found[-1][1] or 1)
    return value


def stated_choice(reply: str, choices: dict[str, str]) -> str | None:
    """The letter that a reply clearly states. "" if its value is none of the choices, None if the reply is unclear.

    Tried in order: the last box, as a letter, text or number; the last statement ("The answer is (B)."); a reply that
    is a choice or begins with one. extract_choice() always guesses a letter, which is too lenient for verifying data.
    """
    letters, answer = re.escape("".join(choices)), last_boxed(reply) or ""
    if found := re.fullmatch(rf"(?:[Oo]ption |[Cc]hoice )?\(?([{letters}])\)?(?:[.:)].*)?", answer, re.DOTALL):
        return found.group(1)
    value, amounts = parse_quantity(answer), {letter: parse_quantity(text) for letter, text in choices.items()}
    plain = {letter: normalise_latex(text) for letter, text in choices.items()}
    wanted = normalise_latex(answer or reply)
    equal = [letter for letter in choices if wanted and plain[letter] == wanted]
    equal = equal or [letter for letter in choices if numbers_equal(value, amounts[letter])]
    if len(equal) == 1:
        return equal[0]
    for pattern in choice_statements(letters):
        if found := pattern.findall(reply):
            return found[-1]
    heads = re.findall(rf"^[^\w\n]*([{letters}])(?!\w)[^\w\n]*(.*)$", reply, re.MULTILINE)
    if len({letter for letter, _ in heads}) == 1 and re.match(rf"\W*{heads[0][0]}(?!\w)", reply):
        letter, rest = heads[0]
        if not rest or plain[letter] and normalise_latex(rest).startswith(plain[letter]):
            return letter
    # A boxed answer that equals no choice is wrong if it or a choice is a number. If neither is, it stays unclear: two
    # formulas may be equal without looking equal. It stays unclear too if "none of these" is a choice.
    known = not equal and any(v is not None for v in (value, *amounts.values()))
    open_ended = any(re.search(r"\b(?:none|cannot|can't|not)\b|都不", text, re.IGNORECASE) for text in choices.values())
    return "" if answer and known and not open_ended else None


def checkable(reference: dict | None, run_code: bool) -> bool:
    """True if check_reply() may use this reference. run_code: programs in replies may be run."""
    return bool(reference) and (reference["kind"] != "code" or run_code)


def check_reference(reference: Any, where: str) -> None:
    """InputError if check_reply() could check no reply against this reference, {"kind", "value"}. where: "file:line"."""
    kind, value = (reference.get("kind"), reference.get("value")) if isinstance(reference, dict) else (None, None)
    fields = value if isinstance(value, dict) else {}
    if kind == "number":
        fits, needs = is_number(value) or isinstance(value, str) and stated_number(value) is not None, "a number"
    elif kind == "choice":
        letters = list(fields["choices"]) if isinstance(fields.get("choices"), dict) else []
        fits = fields.get("letter") in letters and all(len(letter) == 1 and letter.isalnum() for letter in letters)
        needs = "an object with choices, {letter: text}, and the letter of one of them; a letter is one character"
    elif kind == "exact":
        fits, needs = isinstance(value, str), "a text"
    elif kind == "format":
        names, kwargs = fields.get("instruction_id_list"), fields.get("kwargs")
        fits = isinstance(names, list) and isinstance(kwargs, list) and len(names) == len(kwargs) > 0
        needs = "an object with an instruction_id_list and as many kwargs, as in IFEval's rows"
    elif kind == "code":
        entry_point = fields.get("entry_point")
        fits = isinstance(fields.get("tests"), str) and (entry_point is None or isinstance(entry_point, str))
        needs = "an object with tests, a text, and an entry_point, the name of a function"
    else:
        needs = "a kind (number, choice, exact, format or code) and a value"
        raise InputError(f"{where}: reference needs {needs}, found {shown(reference)}")
    if not fits:
        raise InputError(f"{where}: the value of the {kind} reference is {shown(value)}; it must be {needs}")
    for name, arguments in zip(names, kwargs) if kind == "format" else ():
        follows(name, "any", arguments, where)  # raises InputError for an instruction that cannot be checked


def check_reply(kind: str, reply: str, reference: Any) -> bool | None:
    """True if a reply gives the reference's answer, False if it does not, None if that cannot be checked.

    A thought before the answer does not count. The reference depends on the kind:
        "number"   a number, or a string that ends with one
        "choice"   {"letter", "choices": {letter: text}}
        "exact"    a string
        "format"   {"instruction_id_list", "kwargs"} as in IFEval's rows; the reply must follow all, by the strict rules
        "code"     {"tests", "entry_point"}; RUNS the reply's program in the sandbox, see run_program()
    """
    reply = without_thought(reply)
    if kind == "number":
        value = (
            float(reference)
            if is_number(reference)
            else stated_number(reference)
            if isinstance(reference, str)
            else None
        )
        answer = stated_number(last_boxed(reply) or "")
        return None if value is None else numbers_equal(stated_number(reply) if answer is None else answer, value)
    if kind == "choice" and isinstance(reference, dict) and isinstance(reference.get("choices"), dict):
        letters = {str(k): str(v) for k, v in reference["choices"].items()}
        stated = stated_choice(reply, letters) if reference.get("letter") in list(letters) else None
        return None if stated is None else stated == reference["letter"]
    if kind == "exact" and isinstance(reference, str):
        return normalise_text(reply) == normalise_text(reference)
    if kind == "format" and isinstance(reference, dict) and reference.get("instruction_id_list"):
        pairs = zip(reference["instruction_id_list"], reference["kwargs"], strict=True)
        return all(follows(name, reply, kwargs, "reference") for name, kwargs in pairs)
    if kind == "code" and isinstance(reference, dict) and isinstance(reference.get("tests"), str):
        entry_point = reference.get("entry_point")
        return run_program(extract_program(reply, entry_point), reference["tests"], entry_point)[0]
    return None


def verify(reference: dict | None, reply: str, run_code: bool) -> bool | None:
    """check_reply() with a record's reference. None also without a reference, or if the program may not be run."""
    return check_reply(reference["kind"], reply, reference["value"]) if checkable(reference, run_code) else None


def normalise_text(text: str) -> str:
    """A text in lower case, stripped of surrounding space and of one final full stop."""
    text = text.strip().casefold()
    return (text[:-1] if text.endswith((".", "。")) else text).rstrip()
