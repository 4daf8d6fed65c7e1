"""IFEval's 25 verifiable instructions (arXiv 2311.07911): checks whether a reply follows them, strictly or loosely.

    follows("length_constraints:number_words", reply, {"relation": "at least", "num_words": 300})

The definitions are those of the benchmark's own checker, which uses two large packages, langdetect and NLTK. These rules
replace them; docs/results/parity.md has the measured agreement:
- Sentences are split by Punkt's rules, without its statistics of 20,000 words: count_sentences().
- A language is guessed from its script and its most common words. A reply in capitals is converted to lower case first;
  langdetect ignores words in capitals. A single word such as "engraving" is English here; langdetect guesses at random.
- Words in capitals are split by NLTK's Treebank rules. Rare exceptions such as "'TWAS" are one word here, two in NLTK.
One rule differs on purpose: a letter to be counted may be any character. The official checker replaces "#" and "!", which
two prompts ask for, by a random letter.
"""

import collections
import json
import re
import unicodedata

from core.files import InputError

# ---------------------------------------------------------------------------------------------------------------------
# Language

SCRIPTS = {"HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "THAI": "th", "HEBREW": "he", "GREEK": "el"}
SCRIPTS |= {"BENGALI": "bn", "GURMUKHI": "pa", "GUJARATI": "gu"}
SCRIPTS |= {"TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml"}
WORDS = {  # the most common words of languages that share a script
    "LATIN": {
        "en": "the of and to in a is that for it as was with be by on not he this are or his from at which but have an you i "
              "they were their one all we can her has there been if more when will would who so no your my do what its",
        "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat "
              "dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber ich wir",
        "fr": "le la les de des du et en un une que qui dans pour pas au sur ne se est ce il sont avec par plus je nous vous "
              "cette mais ou son sa ses aux être elle",
        "es": "el la los las de y en que un una por con no para es se del al lo como más su sus pero o este esta son ha yo "
              "muy sin sobre también ser",
        "it": "il lo la i gli le di e che in un una per non è con del della dei delle si da al sono come anche più ma nel "
              "alla questo questa ha io o se mi",
        "pt": "o a os as de e em que um uma para não com do da dos das no na se por mais como mas ao é foi ser são ou seu sua "
              "você eu também pelo pela isso",
        "nl": "de het een en van in is dat op te zijn met voor niet aan er om ook als dan maar bij uit door over naar ik je "
              "wordt werd deze",
        "fi": "ja on ei se että hän oli olla mutta kun niin myös kuin ovat joka tai jos voi minä sinä tämä ole sen he me jotka "
              "mukaan kanssa kuten hyvin",
        "sw": "na ya wa kwa ni katika za la kuwa cha hii huo yake kama pia hiyo au lakini wao yeye sana watu kila hivyo baada "
              "ambayo ambao kwamba mimi wewe sisi si",
        "vi": "và của là có trong được cho không một với các những này để đã khi người đó từ về như tôi bạn cũng sẽ nhiều "
              "vào ra nhưng hay",
        "tr": "ve bir bu için ile da de olarak daha çok gibi en kadar ne var olan sonra ama değil ben",
        "id": "yang dan di dengan untuk dari ini itu pada tidak dalam adalah akan ke saya anda juga atau oleh bisa",
        "pl": "i w na z się nie do to że jest o jak ale po co tak za od przez są dla który",
        "sv": "och att det i som en på är av för med den till inte om ett har de jag var vi men kan eller",
    },
    "CYRILLIC": {
        "ru": "и в не на что с он я как это по но они к у из за вы так же от для его она мы был все бы есть или быть чтобы",
        "bg": "и на да се от за в е са не с по като че ще си това до но или при той тя ние вие бъде може който които съм",
        "uk": "і в не на що з він я як це до та але вони у із за ви так від для його вона ми був є або бути щоб",
    },
    "ARABIC": {
        "ar": "في من على إلى أن هذا هذه التي الذي لا ما كان عن مع هو هي أو كل قد لم بعد ثم إن كما أنا",
        "fa": "و در به از که این را با است برای آن یک می ها های خود تا بر هم نیز شود کرد شما من ما بود اما",
        "ur": "کے میں کی ہے اور سے کا کو اس پر نے ہیں کہ یہ ایک بھی تو ہو وہ کر آپ لیے ہم تھا نہیں گیا",
    },
    "DEVANAGARI": {
        "hi": "के में की है और से का को पर ने हैं कि यह एक भी तो हो वह कर आप लिए हम था नहीं इस जो ही",
        "mr": "आणि आहे या मध्ये आहेत एक हे ते ही तो ती पण नाही मी आपण त्या होते करा साठी असे जे च तुम्ही आम्ही होता",
        "ne": "र छ को मा हो छन् यो पनि एक ले गर्न लागि भने त्यो हुन्छ थियो छैन म हामी तपाईं गर्नु गरेको सँग का की",
    },
}  # fmt: skip
WORDS = {
    script: {language: set(text.split()) for language, text in languages.items()} for script, languages in WORDS.items()
}
FINAL_LETTERS = {  # of words, for texts with as many common words of one language as of another
    "de": "nertd", "fr": "estnr", "es": "aosen", "it": "aoei", "pt": "aosem", "nl": "ntedg", "fi": "naäit", "sw": "aioeu",
    "vi": "ngcht", "tr": "nreai", "id": "naikg", "pl": "aeoiy", "sv": "rnate",
}  # fmt: skip


def guess_language(text: str) -> str | None:
    """Guesses a text's language by its most common script, then by its words. -> ISO 639-1 code, None without letters.

    Tells the languages above apart. Any other language gets the code of one of them, or "?". If several languages have
    as many words in the text, English is preferred, then the one whose words often end in the same letters.
    """
    scripts = collections.Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    if not scripts:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * sum(scripts.values()):
        return "ja"  # Japanese may have more Han characters than kana
    script = scripts.most_common(1)[0][0]
    words = re.findall(r"[^\W\d_](?:[\w\u0900-\u097f]|(?<=\w)['’](?=\w))*", text.lower())
    hits = {language: sum(word in common for word in words) for language, common in WORDS.get(script, {}).items()}
    if not hits:
        return SCRIPTS.get(script, "?")
    if not any(hits.values()):
        return next(iter(hits))  # the script's first language
    endings = {language: sum(word[-1] in FINAL_LETTERS.get(language, "") for word in words) for language in hits}
    return max(hits, key=lambda language: (hits[language], language == "en", endings[language]))


def in_language(text: str, language: str) -> bool:
    """True if a text is in the language. A text without letters is in every language, as in the benchmark's checker."""
    return guess_language(text) in (language, None)


# ---------------------------------------------------------------------------------------------------------------------
# Counting

ABBREVIATIONS = set(  # those of NLTK's English model of Punkt
    "a.a a.c a.d a.g a.h a.m a.m.e a.s a.t adm ala ariz aug ave b.f b.v bros c c.i.t c.o.m.b c.v calif chg cie co col colo "
    "conn corp cos ct d d.c d.h d.w dec dr e e.f e.h e.l e.m f f.g f.j feb fla fri ft g g.d g.f g.k ga gen h h.c h.f h.m "
    "i.m.s ill inc j.b j.c j.j j.k j.p j.r jan jr k kan ky l l.a l.f l.p lt ltd m m.b.a m.d.c m.j maj messrs mg mich minn mr "
    "mrs ms n n.c n.d n.h n.j n.m n.v n.y nev nov oct ok okla ore p p.a.m p.m pa ph.d prof r r.a r.h r.i r.j r.k r.t rep reps "
    "s s.a s.a.y s.c s.g s.p.a s.s sen sep sept sr st sw t t.j tenn tues u.k u.n u.s u.s.a u.s.s.r v va vs vt w w.c w.r w.va "
    "w.w wash wed wis yr".split()
)
STARTERS = set(  # the model's frequent first words of sentences, then common words that it never saw as names
    "according although among both but despite even he however i if in indeed instead it many meanwhile moreover most "
    "nevertheless nonetheless nor sales separately similarly since so some the there these they this though thus under when "
    "while yet above almost along already always anyone anything ask begin behind besides better between call cannot check "
    "choose consider create does either encourage ensure especially eventually finally following furthermore her here him "
    "include learn likewise neither nothing overall please practice provide remember someone sometimes soon specifically "
    "still such suddenly thank them therefore through throughout together try ultimately unfortunately unless upon us were "
    "whether which within without yes your".split()
)
INSIDE = r"""[)";}\]*:@'({\[‘’“”«»?!]"""  # ends a token, together with white space
TOKEN = re.compile(
    rf"""-{{2,}}|\.{{2,}}|(?=[^("`{{\[:;&\#*@)}}\]\-,])\S+?(?=\s|$|{INSIDE}|--|\.\.|,(?=$|\s|{INSIDE}|--|\.\.))|\S"""
)


def ends_sentence(token: str, following: str) -> bool:
    """Applies Punkt's rules for a full stop: an abbreviation, an ellipsis, an initial or a number may not be an end."""
    if token in (".", "?", "!"):
        return True
    if not token.endswith("."):
        return False
    word, upper = token[:-1].lower(), following[0].isupper()
    inner = following[0].islower() or following in (*";:,.!?",)  # the next token begins no sentence
    if len(word) == 1 and word.isalpha():  # an initial, or the letter of a list item
        initials = upper and len(following.rstrip(".")) == 1
        return word not in ABBREVIATIONS and not inner and not initials
    if word in ABBREVIATIONS or word.split("-")[-1] in ABBREVIATIONS or token.endswith(".."):
        return upper and following.lower() in STARTERS
    return not (inner and re.fullmatch(r"-?[.,]?\d[\d,.-]*", word))


def count_sentences(text: str) -> int:
    """Counts sentences as NLTK's Punkt does (Kiss and Strunk 2006): "1. Go on." is two, "**Go on.**" two, "e.g. a" two.

    Also ends sentences at 。！？, which Punkt does not know. STARTERS replaces its statistics of 20,000 words, so "Mr. Elephant"
    is one sentence, and "A. Smith" two.
    """
    words = re.sub(r"[。！？]+[”’」』）]*", "! ", text).split()
    count, begin, offset = 0, 0, 0  # the current sentence begins in words[begin] after offset characters
    for i, word in enumerate(words):
        inside = [end.end() for end in re.finditer(rf"[.?!](?={INSIDE})", word)]
        if word[-1] in ".?!" and i + 1 < len(words):
            context, following = f"{word} {words[i + 1]}", (i + 1, 0)
        elif inside:
            context, following = word[: inside[-1] + 1], (i, inside[-1])
        else:
            continue
        tokens = TOKEN.findall(context)
        if any(ends_sentence(*pair) for pair in zip(tokens, tokens[1:])):
            count += 1
            begin, offset = following
    rest = " ".join(words[begin:])[offset:]
    only_closing = count > 0 and re.fullmatch(r"""["')\]}‘’“”«»]*""", rest)
    return count + (rest != "" and not only_closing)


def split_paragraphs(text: str, separator: str) -> list[str] | None:
    """The texts between separators. An empty text at either end is left out. None if one in the middle is empty."""
    parts = [part.strip() for part in re.split(separator, text)]
    inner = parts[not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]
    return inner if all(inner) else None


def compare_count(count: int, relation: str, threshold: int, where: str) -> bool:
    if relation not in ("less than", "at least"):
        raise InputError(f"{where}: the relation is {relation!r}; it must be 'less than' or 'at least'")
    return count < threshold if relation == "less than" else count >= threshold


# ---------------------------------------------------------------------------------------------------------------------
# Instructions that need more than one line


def count_bullets(reply: str) -> int:
    """Counts the lines that begin with "-", and those that begin with a single "*" (two mark bold type).

    Both patterns are counted separately, as in the benchmark's checker. After an empty "*" the match includes the next
    line, which may then be counted twice.
    """
    return sum(len(re.findall(pattern, reply, re.MULTILINE)) for pattern in (r"^\s*\*[^*].*$", r"^\s*-.*$"))


def count_highlights(reply: str) -> int:
    """Counts texts between asterisks, *like this* or **like this**, on one line and not empty.

    A text in double asterisks counts twice if both patterns match it, as in the benchmark's checker.
    """
    single = [text for text in re.findall(r"\*[^*\n]*\*", reply) if text.strip("*").strip()]
    double = [text for text in re.findall(r"\*\*([^*\n]*)\*\*", reply) if text.strip()]
    return len(single) + len(double)


def count_capital_words(reply: str) -> int:
    """Counts words in capitals.

    A word ends at white space and at most punctuation, but not at / - . ("AND/OR" and "U.S." are one word each). A
    contraction is two words: "NASA'S" counts twice, "NASA's" once. CANNOT, GONNA and the like are two words too.
    """
    quote = r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)"
    text = re.sub(rf"""(?i)[][(){{}}<>?!;@#$%&*"`«»“”„‘’‒–—―]|--|\.\.+|''|[:,](?!\d)|{quote}""", " ", reply)
    text = re.sub(r"(?i)(?<=[^'\s])(?=(?:'(?:s|m|d|ll|re|ve)?|n't)(?!\S))", " ", text)
    text = re.sub(
        r"(?i)\b(?:can(?=not\b)|(?:gim|lem)(?=me\b)|got(?=ta\b)|gon(?=na\b)|wan(?=na(?!\S)))", r" \g<0> ", text
    )
    return sum(word.isupper() for word in text.split())


def has_postscript(reply: str, marker: str) -> bool:
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, reply.lower()) is not None


def paragraph_starts_with(reply: str, total: int, n: int, word: str) -> bool:
    """True if there are `total` paragraphs and paragraph n (from 1) begins with the word.

    Empty paragraphs count for n but not for the total.
    """
    parts = reply.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != total or n > total or not parts[n - 1].strip():
        return False
    first = re.split(r"[.,?!'\"]", parts[n - 1].split()[0].lstrip("'").lstrip('"'))[0]
    return first.lower() == word.lower()


def is_json(reply: str) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?|```$", "", reply.strip()).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_two_responses(reply: str) -> bool:
    parts = split_paragraphs(reply, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def count_matches(pattern: str, reply: str) -> int:
    return len(re.findall(pattern, reply, re.IGNORECASE))


# ---------------------------------------------------------------------------------------------------------------------
# The table

# {instruction: function of r, k, w}. It is true if the reply r follows the instruction. k: the instruction's arguments
# in the data file. w: file and line, for errors. Keywords are regular expressions, as in the benchmark's checker.
CHECKS = {
    "keywords:existence": lambda r, k, w: all(count_matches(word, r) for word in k["keywords"]),
    "keywords:frequency": lambda r, k, w: compare_count(
        count_matches(k["keyword"].strip(), r), k["relation"], k["frequency"], w
    ),
    "keywords:forbidden_words": lambda r, k, w: (
        not any(count_matches(rf"\b{word}\b", r) for word in k["forbidden_words"])
    ),
    "keywords:letter_frequency": lambda r, k, w: compare_count(
        r.lower().count(k["letter"].lower()), k["let_relation"], k["let_frequency"], w
    ),
    "language:response_language": lambda r, k, w: in_language(r, k["language"]),
    "length_constraints:number_sentences": lambda r, k, w: compare_count(
        count_sentences(r), k["relation"], k["num_sentences"], w
    ),
    "length_constraints:number_paragraphs": lambda r, k, w: (
        len(split_paragraphs(r, r"\*\*\*") or []) == k["num_paragraphs"]
    ),
    "length_constraints:number_words": lambda r, k, w: compare_count(
        len(re.findall(r"\w+", r)), k["relation"], k["num_words"], w
    ),
    "length_constraints:nth_paragraph_first_word": lambda r, k, w: paragraph_starts_with(
        r, k["num_paragraphs"], k["nth_paragraph"], k["first_word"]
    ),
    "detectable_content:number_placeholders": lambda r, k, w: len(re.findall(r"\[.*?\]", r)) >= k["num_placeholders"],
    "detectable_content:postscript": lambda r, k, w: has_postscript(r, k["postscript_marker"].strip()),
    "detectable_format:number_bullet_lists": lambda r, k, w: count_bullets(r) == k["num_bullets"],
    "detectable_format:constrained_response": lambda r, k, w: any(
        f"My answer is {answer}." in r for answer in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": lambda r, k, w: count_highlights(r) >= k["num_highlights"],
    "detectable_format:multiple_sections": lambda r, k, w: (
        len(re.findall(rf"{re.escape(k['section_spliter'].strip())}\s?\d+", r)) >= k["num_sections"]
    ),
    "detectable_format:json_format": lambda r, k, w: is_json(r),
    "detectable_format:title": lambda r, k, w: any(
        title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", r)
    ),
    "combination:two_responses": lambda r, k, w: has_two_responses(r),
    "combination:repeat_prompt": lambda r, k, w: r.strip().lower().startswith(k["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda r, k, w: r.strip().strip('"').lower().endswith(k["end_phrase"].strip().lower()),
    "startend:quotation": lambda r, k, w: len(r.strip()) > 1 and r.strip()[0] == r.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda r, k, w: compare_count(
        count_capital_words(r), k["capital_relation"], k["capital_frequency"], w
    ),
    "change_case:english_capital": lambda r, k, w: r.isupper() and in_language(r.lower(), "en"),
    "change_case:english_lowercase": lambda r, k, w: r.islower() and in_language(r, "en"),
    "punctuation:no_comma": lambda r, k, w: "," not in r,
}


def follows(instruction: str, reply: str, kwargs: dict, where: str = "", loose: bool = False) -> bool:
    """True if a reply follows an instruction. An empty reply follows none.

    loose: any of eight versions of the reply may follow it: with and without its first line, its last line and its
    asterisks. So "Sure, here it is:" and bold type are forgiven. where: file and line of the instruction, for errors.
    InputError for an unknown instruction or unusable arguments.
    """
    if not isinstance(instruction, str) or instruction not in CHECKS:
        raise InputError(f"{where}: unknown instruction {instruction!r}; known are {', '.join(CHECKS)}")
    versions = [reply]
    if loose:
        lines = reply.split("\n")
        versions += ["\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1])]
        versions += [version.replace("*", "") for version in versions]
    try:
        return any(CHECKS[instruction](version, kwargs, where) for version in versions if version.strip())
    except (KeyError, IndexError, TypeError, AttributeError, re.error) as e:
        raise InputError(f"{where}: the arguments {kwargs} of {instruction} cannot be used: {e!r}") from None
