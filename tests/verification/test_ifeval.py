"""ifeval.py: for each of the 25 instructions, replies that follow it and replies that do not; languages; sentences."""

import json
import os

import pytest

from core.files import InputError
from verification.ifeval import CHECKS, count_sentences, follows, guess_language

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
CASES = [  # instruction, arguments, replies that follow, replies that do not
    ("keywords:existence", {"keywords": ["dog", "day"]}, ["A DOGGED Sunday"], ["A dog", "day"]),
    ("keywords:frequency", {"keyword": "knot ", "frequency": 2, **AT_LEAST}, ["Knot, knots"], ["one knot"]),
    ("keywords:frequency", {"keyword": "knot", "frequency": 2, **LESS}, ["one knot", "none"], ["knot knot"]),
    ("keywords:forbidden_words", {"forbidden_words": ["damn", "go on"]}, ["damned", "go one"], ["Damn!", "Do go on."]),
    ("keywords:letter_frequency", {"letter": "J", "let_frequency": 2, "let_relation": "at least"}, ["Jj"], ["j"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "less than"}, ["#a"], ["##"]),
    ("language:response_language", {"language": "de"}, ["Das ist für den Hund."],
     ["This is for the dog.", "C'est pour le chien."]),
    ("length_constraints:number_sentences", {"num_sentences": 3, **LESS}, ["One. Two, with Dr. Who."],
     ["He ran. She sat! They ate?", "1. Go on.\n2. Stop."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, **AT_LEAST}, ["He came. She left."],
     ["He came at 3.5 p.m. today"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***\na *** b\n***"],
     ["a", "a\n\nb", "a***b***c", "a *** *** b"]),
    ("length_constraints:number_words", {"num_words": 3, **AT_LEAST}, ["one two-three"], ["one two"]),
    ("length_constraints:number_words", {"num_words": 3, **LESS}, ["one, two!"], ["one two three"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Elm"},
     ["a\n\n\"ELM, b", "a\n\nelm"], ["a\n\nb elm", "a\n\nelm\n\nc", "elm", "a\n\nelms"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] and [b c]"], ["[a]", "(a) (b)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. x", "p. s. y"], ["PS: x", "Bye."]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. x", "p. p. s y"], ["P.S. x"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n text\n  - b", "*\n- a"],
     ["* a", "** a\n* b", "* a\n* b\n- c"]),
    ("detectable_format:constrained_response", {}, ["My answer is maybe.", "Well. My answer is no."],
     ["My answer is No.", "yes"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b c**"],
     ["*a* b", "** ** *a*", "*a\nb* *c*"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1\na", "Section 1\nSection 2", "SECTION A SECTION B"]),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```', "3"], ["{'a': 1}", 'Here: {"a": 1}']),
    ("detectable_format:title", {}, ["<<ode>>\ntext", "x <<a b>>", "<< < >>"],
     ["<ode>", "<< >>", "<<a\nb>>", "<<\t>>"]),
    ("combination:two_responses", {}, ["a ****** b", "******\na\n******\nb"],
     ["a", "a ****** a", "a ****** b ****** c", "a ****** ****** b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, [" say IT. Yes."], ["Sure. Say it.", "Say that."]),
    ("startend:end_checker", {"end_phrase": "So what is next?"}, ['Ha. "so what is next?"', "So what is next? "],
     ["So what is next? Bye", "next?"]),
    ("startend:quotation", {}, [' "a" ', '"a" and "b"'], ['"', "'a'", '"a" b', "“a”"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     ["AB-CD, E f", "NASA'S", "It CANNOT", "**AB**:CD", "I'm OK", "IT’S"],
     ["AB Cd", "AND/OR", "in the U.S. now", "NASA's", "DON'Tx 3:5"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "at least"},
     ["I'm here, I've NASA's plan.", "I’m here, I’ve NASA’s plan.", "DON'T 'GO'"], ["I'm NASA's", "I AM/WAS"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, ["AB cd"], ["AB CD"]),
    ("change_case:english_capital", {}, ["THE DOG IS IN THE HOUSE, 2 TIMES."],
     ["The dog is in the house.", "DER HUND IST IN DEM HAUS", "12"]),
    ("change_case:english_lowercase", {}, ["the dog is in the house."],
     ["The dog is in the house.", "der hund ist in dem haus"]),
    ("punctuation:no_comma", {}, ["a; b. c، d，"], ["a, b"]),
]  # fmt: skip


def test_every_instruction_has_cases():
    assert {case[0] for case in CASES} == set(CHECKS) and len(CHECKS) == 25


@pytest.mark.parametrize(("instruction", "kwargs", "good", "bad"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_instruction(instruction, kwargs, good, bad):
    for reply in good:
        assert follows(instruction, reply, kwargs), reply
    for reply in [*bad, "", " \n"]:  # nothing said follows nothing
        assert not follows(instruction, reply, kwargs), reply


def test_loose_rules():
    """The first line, the last line and the asterisks may be taken away, each by itself or together; nothing else."""

    def both(instruction, reply, **kwargs):
        return [follows(instruction, reply, kwargs, loose=loose) for loose in (False, True)]

    assert both("startend:quotation", '"a"') == [True, True]
    assert both("startend:quotation", 'Sure, here it is:\n"a"') == [False, True]
    assert both("startend:quotation", '"a"\nBye!') == [False, True]
    assert both("startend:quotation", 'Hi!\n*"a"*\nBye!') == [False, True]
    assert both("startend:quotation", 'Hi!\nHo!\n"a"') == [False, False]
    assert both("startend:end_checker", "**The end.**", end_phrase="The end.") == [False, True]
    assert both("punctuation:no_comma", "Well, yes:\nno") == [False, True]
    assert both("punctuation:no_comma", "a, b") == [False, False]


def test_uncheckable_instructions_are_errors():
    with pytest.raises(InputError, match="file:3.*keywords:rhyme.*keywords:existence"):
        follows("keywords:rhyme", "x", {}, "file:3")
    with pytest.raises(InputError, match="file:3.*unknown instruction"):
        follows({"a": 1}, "x", {}, "file:3")
    with pytest.raises(InputError, match="file:3.*cannot be used"):
        nth = {"num_paragraphs": 1, "nth_paragraph": -5, "first_word": "x"}
        follows("length_constraints:nth_paragraph_first_word", "x", nth, "file:3")
    with pytest.raises(InputError, match="file:3.*num_words"):
        follows("length_constraints:number_words", "x", {"relation": "at least"}, "file:3")
    with pytest.raises(InputError, match="file:3.*at most"):
        follows("length_constraints:number_words", "x", {"relation": "at most", "num_words": 3}, "file:3")


LANGUAGES = {
    "en": "The weather is good today, and we can walk to the market with our friends.",
    "de": "Das Wetter ist heute gut und wir können mit unseren Freunden zum Markt gehen.",
    "fr": "Il fait beau aujourd'hui et nous pouvons aller au marché avec des amis.",
    "es": "Hoy hace buen tiempo y podemos ir al mercado con los amigos de la escuela.",
    "it": "Oggi il tempo è bello e possiamo andare al mercato con gli amici della scuola.",
    "pt": "Hoje o tempo está bom e podemos ir ao mercado com os amigos da escola.",
    "fi": "Tänään on hyvä sää, ja me voimme mennä torille, kun se on auki.",
    "sw": "Leo hali ya hewa ni nzuri na tunaweza kwenda sokoni pamoja na marafiki wa shule.",
    "vi": "Hôm nay thời tiết đẹp và chúng tôi có thể đi chợ với những người bạn của mình.",
    "ru": "Сегодня хорошая погода, и мы можем пойти на рынок с друзьями.",
    "bg": "Днес времето е хубаво и ние можем да отидем на пазара с приятели.",
    "ar": "الطقس جميل اليوم ويمكننا أن نذهب إلى السوق مع الأصدقاء من المدرسة.",
    "fa": "امروز هوا خوب است و ما می توانیم با دوستان به بازار برویم.",
    "ur": "آج موسم اچھا ہے اور ہم دوستوں کے ساتھ بازار جا سکتے ہیں۔",
    "hi": "आज मौसम अच्छा है और हम दोस्तों के साथ बाज़ार जा सकते हैं।",
    "mr": "आज हवामान चांगले आहे आणि आम्ही मित्रांसोबत बाजारात जाऊ शकतो.",
    "ne": "आज मौसम राम्रो छ र हामी साथीहरूसँग बजार जान सक्छौं।",
    "ko": "오늘은 날씨가 좋아서 친구들과 시장에 갈 수 있습니다.",
    "ja": "今日は天気が良いので、友達と市場へ行けます。",
    "zh": "今天天气很好，我们可以和朋友一起去市场。",
    "th": "วันนี้อากาศดี เราไปตลาดกับเพื่อนได้",
    "bn": "আজ আবহাওয়া ভালো এবং আমরা বাজারে যেতে পারি।",
    "pa": "ਅੱਜ ਮੌਸਮ ਚੰਗਾ ਹੈ ਅਤੇ ਅਸੀਂ ਬਾਜ਼ਾਰ ਜਾ ਸਕਦੇ ਹਾਂ।",
    "gu": "આજે હવામાન સારું છે અને અમે બજારમાં જઈ શકીએ છીએ.",
    "ta": "இன்று வானிலை நன்றாக உள்ளது, நாம் சந்தைக்குச் செல்லலாம்.",
    "te": "ఈరోజు వాతావరణం బాగుంది, మనం మార్కెట్‌కు వెళ్లవచ్చు.",
    "kn": "ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ, ನಾವು ಮಾರುಕಟ್ಟೆಗೆ ಹೋಗಬಹುದು.",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_language(language):
    assert guess_language(LANGUAGES[language]) == language
    assert guess_language(f"{LANGUAGES[language]} (GPT-4, 2023)") == language


def test_texts_with_as_many_words_of_several_languages():
    assert guess_language("la luna brilla") in ("es", "it")  # it means the same in both; French has "la" too
    assert guess_language("la maison est petite") == "fr" and guess_language("la casa grande") != "fr"
    assert guess_language("in winter") == "en"  # "in" is German and Dutch as well
    assert guess_language("engraving") == "en"  # none of the words


def test_no_letters_are_no_language():
    assert guess_language("12 + 3 = 15 !") is None and guess_language("") is None
    assert follows("language:response_language", "12!", {"language": "kn"})
    assert guess_language("True.") == "en" and not follows("language:response_language", "True.", {"language": "kn"})


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("One. Two! Three?", 3), ("No end", 1), ("", 0), ("Wait... what", 1), ("Hi!!! You.", 2),
        ("Mr. Smith met J. R. Brown.", 1), ("It cost 3.5 dollars. Fine.", 2), ('He said "Go." Then he left.', 2),
        ("1. One thing.\n2. Two things.", 4), ("1. a thing", 1), ("e.g. this one. And that.", 3), ("3 p.m. However, no", 2),
        ("It was 3 p.m. today", 1), ("So do I. You too.", 2), ("visit example.com now", 1), ("Yes… No", 1), ("(Go.) Now.", 2),
        ("**Go.** Now.", 2), ("**Go.**", 2), ("他来了。你呢？好！", 3),
    ],
)  # fmt: skip
def test_sentences(text, n):
    """The counts are those of NLTK's Punkt, except for the Chinese text, which it takes for one sentence."""
    assert count_sentences(text) == n


@pytest.mark.skipif("DATA_DIR" not in os.environ, reason="DATA_DIR names no folder of the original files")
def test_the_original_file_can_be_checked():
    with open(os.path.join(os.environ["DATA_DIR"], "ifeval/input_data.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    pairs = [pair for row in rows for pair in zip(row["instruction_id_list"], row["kwargs"], strict=True)]
    assert len(pairs) == 834 and {name for name, _ in pairs} == set(CHECKS)
    held = [follows(name, "The dog is here. It is a good day.", kwargs) for name, kwargs in pairs]
    assert 0 < sum(held) < len(held)
