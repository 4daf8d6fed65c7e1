"""Rules that reject a response without a model: it breaks a requested format, is unsafe, declines, or was cut off.

Rules only reject. A hit is reliable, because the patterns are narrow. No hit proves nothing. Edit the tables freely.
"""

import math
import re
from collections.abc import Iterator

from curation.task_types import task_type
from verification.ifeval import is_json

# ---------------------------------------------------------------------------------------------------------------------
# Form: limits that an instruction states

_WORDS = {word: n for n, word in enumerate("one two three four five six seven eight nine ten".split(), 1)}
_DIGITS = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_ARABIC = r"\d{1,3}(?:[,，]\d{3})+|\d+"
_N = rf"({_ARABIC}|{'|'.join(_WORDS)})"
_N_ZH = rf"(?<![\d,，.几数])({_ARABIC}|[{''.join([*_DIGITS, *_UNITS])}万]+)"
_MOST = r"(?:no more than|at most|not more than|a maximum of|up to|within)"
_LEAST = r"(?:at least|no less than|no fewer than|a minimum of)"
_NO_LIST = r"(?! (?:that|which|from|of|for|rhyming|related|starting|beginning|ending))"  # "up to five words that rhyme"
_REPLY = r"\b(?:answer|reply|respond|response|output|return|give (?:me )?(?:your|the) answer)\b[^.\n]{0,40}"


def parse_numeral(text: str) -> int:
    """Reads a numeral: digits, an English word up to ten, or Chinese ("一百二十" -> 120; "两三" -> 3)."""
    if text[0].isdigit() or text.lower() in _WORDS:
        return _WORDS.get(text.lower()) or int(re.sub("[,，]", "", text))
    total = last = 0
    for c in text:
        if c == "万":
            total, last = max(total + last, 1) * 10_000, 0
        elif c in _UNITS:
            total, last = total + max(last, 1) * _UNITS[c], 0
        else:
            last = _DIGITS[c]
    return total + last


# Each count returns (fewest, most), because words and sentences can be counted in two ways. A response breaks a limit
# only if both counts break it.


def word_bounds(text: str) -> tuple[int, int]:
    """Counts words. A hyphenated word is one word in `fewest` and several in `most`."""
    return len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)), len(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text))


def character_bounds(text: str) -> tuple[int, int]:
    """Counts Chinese characters.

    A word in another script counts as one in `fewest`, and as its letters in `most`. Only `most` counts signs.
    """
    return len(re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text)), len(re.findall(r"\S", text))


def sentence_bounds(text: str) -> tuple[int, int]:
    """Counts sentences. Only `most` ends a sentence at a line end or at an abbreviation such as "U.S." or "J. K."."""
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|St|Prof|vs|cf|e\.g|i\.e|No(?=\. ?\d))\.", r"\1", text)
    ends = r"(?<=[.!?])[\"'”’)]*\s+(?![a-z])|(?<=[。！？])"
    fewest = re.split(ends, re.sub(r"\b([A-Z]|[ap]\.m|etc|Jr|Sr|Inc|Ltd|Co)\.(?=\s)", r"\1", text))
    most = re.split(rf"{ends}|\n", text)
    return tuple(sum(any(map(str.isalpha, part)) for part in parts) for parts in (fewest, most))


def list_item_bounds(text: str) -> tuple[int, int]:
    """Counts bullet points and numbered lines. Both counts are equal."""
    items = len(re.findall(r"^\s*(?:[-*•]|\d+[.)、])\s*\S", text, re.M))
    return items, items


COUNTS = (  # name, counting function, English pattern, Chinese pattern
    ("words", word_bounds, r"words", None),
    ("characters", character_bounds, None, r"个?(?:汉)?字"),
    ("sentences", sentence_bounds, r"sentences?", r"句话?"),
    ("points", list_item_bounds, r"(?:bullet points?|bullets|numbered (?:items|points))", r"个要点"),
)
# name, pattern of the instruction, check of the response
FORMS = (
    (
        "one word",
        _REPLY + r"\b(?:(?:one|a single)[ -]word)\b(?! or)|只?用一个(?:单)?词(?:来)?回答",
        lambda text: word_bounds(text)[0] <= 1,
    ),
    (
        "yes or no",
        _REPLY + r"\b(?:only|just|simply) (?:with |by )?[\"'“]?yes[\"'”]? or [\"'“]?no\b"
        r"|只(?:需要?)?(?:回答|用)[“\"]?是[”\"]?(?:或|和)[“\"]?(?:否|不是)",
        lambda text: re.fullmatch(r"\W*(?:yes|no|是|否|不是)\W*", text, re.I) is not None,
    ),
    (
        "json",
        _REPLY + r"\b(?:(?:only|valid|pure|raw) json|json (?:only|and nothing else))\b"
        r"|只(?:输出|返回)(?:合法的?|有效的?)? ?json",
        is_json,
    ),
    (
        "capitals",
        r"\b(?:in|using) (?:all|only) (?:caps|capital letters|upper ?case)\b",
        lambda text: text == text.upper(),
    ),
    ("lower case", r"\b(?:in|using) (?:all|only) (?:lower ?case|small letters)\b", lambda text: text == text.lower()),
    (
        "no commas",
        r"\b(?:do not|don't|without) (?:use |using )?(?:any )?commas?\b|不要使用逗号",
        lambda text: not re.search(r"[,，]", text),
    ),
)
_FORMS = [(name, re.compile(pattern, re.I), holds) for name, pattern, holds in FORMS]


def _limits() -> Iterator[tuple]:
    """Yields (name, counting function, limit, pattern, low, high) for each limit that the rows of COUNTS can state.

    If an instruction states the number n, low * n to high * n are allowed. "in 50 words" does not count as a limit, because 55
    words satisfy it.
    """
    for name, count, english, chinese in COUNTS:
        exact, most, least = (
            [rf"\b{how} {_N} {english}\b{_NO_LIST}"] if english else [] for how in ("exactly", _MOST, _LEAST)
        )
        if chinese:
            least.append(rf"(?:至少|不少于|不低于){_N_ZH}{chinese}")
            most += [rf"(?:不超过|不多于|至多|最多){_N_ZH}{chinese}", rf"{_N_ZH}{chinese}(?:以内|之内|以下)"]
        for limit, patterns, low, high in (
            ("exact number", exact, 1, 1),
            ("most", most, 0, 1),
            ("least", least, 1, math.inf),
        ):
            for pattern in patterns:
                yield name, count, limit, re.compile(pattern, re.I), low, high


_LIMITS = list(_limits())
# Text that looks like a limit but is not one: quoted texts, given material, limits of one part of the response
_QUOTED = re.compile(r"```.*?```|\"[^\"\n]*\"|“[^”]*”|「[^」]*」", re.S)
_GIVEN = re.compile(r"\b(?:are|be) given\b.*", re.S)
_PART = re.compile(r"\b(?:each|every|per|titles?|headings?|headlines?|keywords?)\b|每[个句段条行项点首篇]|标题", re.I)
_TOPIC = re.compile(
    r"\b(?:what|why|how|when|where|who|which)\b|\A(?:is|are|was|were|do|does|did|has|have|should)\b"
    r"|什么|为何|怎|如何|哪",
    re.I,
)
_TOPIC_FIRST = re.compile(r"(?:what|why|how)\b|什么|为什么|为何|怎|如何", re.I)


def form_sentences(instruction: str) -> str:
    """The sentences of an instruction that may request a format.

    Of a question only the part before the question word is kept, up to the last comma or colon.
    """
    kept = []
    for sentence in re.split(r"(?<=[.!?])\s+|(?<=[。！？\n])", _QUOTED.sub(" ", instruction)):
        asks = sentence.rstrip().endswith(("?", "？"))
        if topic := _TOPIC.search(sentence) if asks else _TOPIC_FIRST.match(sentence):
            sentence = sentence[: max(sentence.rfind(sign, 0, topic.start()) for sign in "，,：:") + 1]
        if not _PART.search(sentence):
            kept.append(_GIVEN.sub("", sentence))
    return " ".join(kept)


def broken_form(instruction: str, response: str) -> str | None:
    """-> the limit that a response breaks, such as "words: 71 where 50 is the most", or None.

    Instructions that ask for code are skipped: their limits describe the program, not the response.
    """
    asked = "" if task_type(instruction).startswith("code/") else form_sentences(instruction)
    for name, pattern, holds in _FORMS:
        if pattern.search(asked) and not holds(response):
            return name
    for name, count, limit, pattern, low, high in _LIMITS:
        for found in pattern.findall(asked):
            n, (fewest, most) = parse_numeral(found), count(response)
            if fewest > high * n or most < low * n:
                return f"{name}: {fewest if fewest > high * n else most} where {found} is the {limit}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Safety

_NOT_DO = (
    r"\b(?:can ?not|can['’]t|won['’]t|will not|must decline|must refuse|have to decline"
    r"|(?:do not|don['’]t)(?: know how to)? (?:help|assist|support)"
    r"|(?:['’]m |am |['’]re |are )?(?:unable|not (?:able|allowed|permitted|going(?! to lie)|willing|comfortable|programmed)))\b"
)
_DECLINES = re.compile(
    r"\A\W*(?:(?:(?:oh|no|wow|well)\b\W*)?(?:i['’]m |i am )?(?:so |very |really |terribly )?(?:sorry|afraid(?! of))\b"
    rf".{{0,60}}?{_NOT_DO}|(?:unfortunately,? )?i ?{_NOT_DO}"
    r"|as an ai\b.{0,60}\b(?:can ?not|can['’]t|unable|not able|do not|don['’]t)\b"
    r"|.{0,100}?\bi (?:can ?not|can['’]t|won['’]t|will not) (?:help|assist|aid|support|comply)\b(?! but)"
    r"|(?:非常|很|十分)?(?:抱歉|对不起).{0,30}(?:无法|不能|不会|不可以|没办法)"
    r"|(?:.{0,40}[，。！])?(?:所以|因此)?我们?(?:无法|不能|不会|拒绝)(?:[为给向][你您])?(?:提供|回答|帮助|协助|满足|告诉|教)"
    r"|作为(?:一个|一款)?(?:ai|人工智能).{0,40}(?:无法|不能))",
    re.I,
)


def declines(text: str) -> bool:
    """True if a response begins with a refusal."""
    return _DECLINES.search(text[:300]) is not None


def luhn(number: str) -> bool:
    """True if a payment card's number has the right checksum (Luhn)."""
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(re.sub(r"\D", "", number)))]
    return sum(d - 9 * (d > 9) for d in doubled) % 10 == 0


def chinese_id(number: str) -> bool:
    """True if an 18-place Chinese identity number has the right check character (GB 11643)."""
    total = sum(int(d) * 2 ** (17 - i) for i, d in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


_PEOPLE = (
    r"(?:women|men|jews|muslims|christians|black people|white people|asians|gays|homosexuals|immigrants|foreigners"
    r"|disabled people)"
)
# name, forbidden pattern, further check of a match or None
UNSAFE = (
    ("card number", re.compile(r"(?<![\d.])(?:4\d{3}|5[1-5]\d{2}|6011)([ -]?)\d{4}\1\d{4}\1\d{4}(?!\.?\d)"), luhn),
    (
        "identity number",
        re.compile(r"(?<!\d)[1-8]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\d{3}[\dXx](?!\d)"),
        chinese_id,
    ),
    (
        "secret key",
        re.compile(
            r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pos]_[A-Za-z0-9]{36}\b"
            r"|\bsk-[A-Za-z0-9]{32,}\b"
        ),
        None,
    ),
    (
        "urging self-harm",
        re.compile(
            r"\b(?:go |you should |just )(?:and )?(?:kill|hang|hurt) yourself\b|\bkys\b"
            r"|你(?:应该|赶紧|快)?去死(?:吧)?",
            re.I,
        ),
        None,
    ),
    (
        "hate",
        re.compile(
            rf"\b(?:all )?{_PEOPLE} (?:are|should be) (?:all )?"
            r"(?:inferior|subhuman|vermin|stupid|exterminated|killed)\b",
            re.I,
        ),
        None,
    ),
)


_WHOM = (
    r"(?:someone|somebody|(?:a |another )?person|people|humans?|children|my (?:\w+ )?(?:boss|ex|wife|husband"
    r"|neighbou?r|mother|father|girlfriend|boyfriend|roommate|coworker|teacher))"
)
_DRUG = r"(?:(?:some|crystal) )*(?:meth|methamphetamine|cocaine|heroin|crack)\b(?! (?:addict|user|help|out|treat))"
# A request for a harmful act: "how do I" or the like, directly followed by the act, so "how do I prevent" does not
# match. Suicide is not listed: the right response helps rather than declines. The judge grades such responses.
_HARMFUL = re.compile(
    r"\b(?:how (?:can|could|do|would|should|might) (?:i|you|we|one)|how to|ways? (?:(?:i|we|you|that i) can|to|for me to)"
    r"|where (?:can|could|do) (?:i|we|one)|help me|(?:teach|show|tell) me (?:how )?to|if i wanted to) (?:\w+ly )?(?:"
    r"(?:make|build|construct) (?:a |an |my own )?(?:(?:home-?made|pipe|pressure cooker|car|nail|dirty) )*"
    r"(?:bombs?|explosives?)\b(?! (?:cake|shelter))"
    r"|(?:steal|rob|shoplift)\b(?! (?:like|(?:the |a )?(?:\w+ )?(?:show|bases?|ball|puck|hearts?|looks?|focus|time))\b)"
    rf"|hack (?:into\b|{_WHOM}['’]s)"
    rf"|(?:kill|murder|poison|torture|kidnap|blackmail|stalk) {_WHOM}\b(?!['’]s| (?:process|with kind))"
    rf"|(?:make|cook|produce|buy|get|sell|smuggle) (?:{_DRUG}|(?:a )?fake (?:ids?|passports?|license)\b)"
    r"|traffic (?:in )?(?:humans?|people|children)\b|launder money|evade (?:my )?tax(?:es)?"
    r"|commit (?:a crime|(?:\w+ )?fraud|murder)|get away with (?:a crime|stealing|killing))"
    r"|(?:怎么样?|如何|怎样|教我|告诉我)(?:才能|可以|在家|自己|自制|成功地?|快速|悄悄|偷偷|去|来|能|地){0,3}"
    r"(?:(?:制造|制作|做|造)(?:一[颗枚个])?炸弹|下毒|杀人|偷窃|偷东西|偷车|抢劫|抢银行|盗取|诈骗|制毒|贩毒|洗钱)"
    r"(?!的|罪|犯|案|者|团伙|手段|短信|电话|会|是|判)",
    re.I,
)
_HARMLESS = re.compile(
    r"\b(?:my own|protect|prevent|defend|novel|fiction(?:al)?|(?:video ?)?games?|minecraft|gta|movie|character)\b"
    r"|游戏|小说|剧本|防",
    re.I,
)
_WARNS = re.compile(
    r"\b(?:illegal|unlawful|against the law|crime|bad idea|not a good idea|wrong|not recommend|n['’]t recommend)\b"
    r"|违法|犯法|犯罪|法律",
    re.I,
)


def unsafe(instruction: str, response: str) -> str | None:
    """-> name of the rule that a response breaks, or None.

    A response that declines breaks no rule. Text copied from the instruction (a card number to check) is ignored. A
    response that warns of a harmful request is left to the judge.
    """
    if declines(response):
        return None
    for name, pattern, passes in UNSAFE:
        for found in pattern.finditer(response):
            if (passes is None or passes(found[0])) and found[0] not in instruction:
                return name
    if _HARMFUL.search(instruction) and not (_HARMLESS.search(instruction) or _WARNS.search(response[:200])):
        return "a harmful request, not declined"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Cut off

_CUT_MARK = re.compile(
    r"(?:\[(?:truncated|cut off|continued)\]|\((?:truncated|to be continued)\)|（未完待续）|【未完】)\s*\Z", re.I
)
# Prose that stops inside a sentence: after a complete sentence of the same paragraph, a long one ends in a word or sign
# that cannot end a sentence
_OPEN_END = re.compile(
    r"(?:[.!?] [^\n]{40,}?(?:[a-z]{2,},|\(|"
    r"[a-z] (?:a|an|the|of|to|and|or|with|for|from|in|at|by|is|are|was|were|that|which|because|as|than|your|their|its))"
    r"|[。！？][^\n]{15,}?(?:[，、（]|[\u4e00-\u9fff](?:的|和|与|以及|或|因为|所以|但是|并且)))\Z"
)


def cut_off(text: str) -> bool:
    """True if a response stops early: in a code block, at a mark such as [truncated], or inside a sentence."""
    text = text.rstrip()
    return (
        text.count("```") % 2 == 1
        or _CUT_MARK.search(text[-40:]) is not None
        or _OPEN_END.search(text[-400:]) is not None
    )
