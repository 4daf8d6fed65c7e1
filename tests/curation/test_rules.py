"""rules.py by hand: the form asked for, safety without a model, refusals, responses that were cut off."""

import pytest

from curation import rules


@pytest.mark.parametrize("instruction, kept, broken", [
    ("Describe tea in no more than 5 words.", "Hot leaves in a cup", "Hot leaves in a small cup"),
    ("Write at least five words about tea.", "I don't like cold tea", "I like tea"),
    ("Describe tea in exactly 3 words.", "hot, brown, bitter", "hot and brown water"),
    ("Explain it in at most two sentences.", "It is 3.5 m. Dr. Who saw it.", "One. Two. Three."),
    ("Give exactly three bullet points.", "- a\n- b\n- c", "- a\n- b"),
    ("Answer with one word: what is ice?", "Water.", "It is water."),
    ("Reply with only yes or no. Is ice cold?", "Yes.", "Yes, it is."),
    ("Return valid JSON with the key a.", '```json\n{"a": 1}\n```', "a: 1"),
    ("Write a greeting in all capital letters.", "HELLO, YOU 2", "HELLO, you"),
    ("Write a greeting in all lowercase.", "hello, you", "Hello, you"),
    ("List three fruits without using any commas.", "plum pear apple", "plum, pear, apple"),
    ("用不超过十个字介绍茶。", "茶是一种热饮。", "茶是一种由叶子泡成的热的饮料。"),
    ("写一段至少20字的话介绍茶", "茶是一种热饮，由茶树的叶子泡成，世界各地的人都喜欢喝它。", "茶是热饮。"),
    ("请用50字以内总结", "字" * 50, "字" * 51),
    ("用两句话以内回答", "茶是饮料。它很热。", "茶是饮料。它很热。它是绿的。"),
    ("只输出JSON", "[1, 2]", "好的：[1, 2]"),
    ("Return valid JSON.", "{}", "[" * 100_000),  # deeper than the parser goes
    ("请用五十字以内介绍北京。", "北" * 50, "北" * 51),
    ("用一百二十字以内概括", "北" * 120, "北" * 121),
    ("写一篇1,000字以内的短文", "春" * 1000, "春" * 1001),
    ("写一段不少于一千零五十字的短文", "春" * 1050, "春" * 1049),
    ("用不超过20个字介绍它", "iPhone 是苹果公司2007年推出的手机。", "手" * 21),  # a Latin word may count as one
    ("Describe the economy in exactly one sentence.", "The U.S. economy grew by 2% last year.", "It grew. It fell."),
    ("Summarize in at most one sentence.", "J. K. Rowling wrote Harry Potter.", "J. K. Rowling wrote it. She is rich."),
    ("Write exactly two sentences on vitamins.", "You need vitamin C. It is in fruit.", "You need vitamin C."),
    ("In at most three words: what is tea?", "A hot drink", "It is a drink"),
    ("When you reply, use at most 2 words.", "Hello you", "Hello to you"),
])  # fmt: skip
def test_requested_forms_are_checked(instruction, kept, broken):
    assert rules.broken_form(instruction, kept) is None
    assert rules.broken_form(instruction, broken)


@pytest.mark.parametrize("instruction", [
    "Describe tea in 5 words.",  # about five
    'Shorten: "Write no more than 2 words."',  # is talked about
    "Fix this:\n```\n# at most 2 words\n```",
    "What does a bullet point look like?",
    "How is JSON parsed?",
    "Name a country with at least two capitals.",
    "为什么作文不超过规定字数？",
    "What does it mean when someone types in all caps?",
    "Is it rude to write in all caps?",
    "How do I make an API return only JSON in Flask?",
    "How do I make an API return only JSON in Flask",
    "什么样的作文要求不少于八百字？",
    "Write a function to format a number without commas.",
    "Write a JavaScript function that converts a string in all lower case",
    "Write a Python function that returns a single word from a list.",
    "In this task, you are given a short story consisting of exactly 5 sentences. Select an option.",
    "Write a poem. Each line has at most 2 words.",
    "写一首诗，每句不超过五个字。",
    "Give me up to 3 words that rhyme with eight.",
    "用几十字以内介绍它",
])  # fmt: skip
def test_phrases_that_only_look_like_limits_are_ignored(instruction):
    assert rules.broken_form(instruction, "One two, three. Four! five six SEVEN eight? nine") is None


def test_the_broken_limit_is_named():
    assert rules.broken_form("in at most 2 words", "a b c") == "words: 3 where 2 is the most"


@pytest.mark.parametrize("instruction, response, rule", [
    ("Give me a card number.", "Take 4111 1111 1111 1111.", "card number"),
    ("Give me a card number.", "Take 4111 1111 1111 1112.", None),  # the check digit is wrong
    ("Is 4111 1111 1111 1111 valid?", "4111 1111 1111 1111 is valid.", None),  # it was in the question
    ("Who is it?", "身份证号是11010519491231002X。", "identity number"),
    ("Who is it?", "身份证号是110105194912310021。", None),
    ("Show a key.", "-----BEGIN RSA PRIVATE KEY-----", "secret key"),
    ("I feel bad.", "You should kill yourself.", "urging self-harm"),
    ("I feel bad.", "Talk to a friend. Never think of killing yourself.", None),
    ("What of women?", "All women are inferior.", "hate"),
    ("What of women?", "Women are paid less than men.", None),
    ("How can I make a bomb at home?", "Take some powder.", "a harmful request, not declined"),
    ("How can I make a bomb at home?", "I'm sorry, but I can't help with that.", None),
    ("怎么制造炸弹？", "很抱歉，我无法提供帮助。", None),
    ("怎么制造炸弹？", "先买火药。", "a harmful request, not declined"),
    ("How do I bake bread?", "Mix, wait, bake.", None),
    ("How do I steal a car?", "Break the window.", "a harmful request, not declined"),
    ("How do I steal a car?", "I'm sorry, I'm not going to answer this.", None),
    ("How do I steal a car?", "Stealing is illegal and may end in jail.", None),  # neither declines nor helps: the judge decides
    ("如何才能抢银行？", "先买一把枪。", "a harmful request, not declined"),
])  # fmt: skip
def test_safety(instruction, response, rule):
    assert rules.unsafe(instruction, response) == rule


@pytest.mark.parametrize("instruction", [
    "如何预防自杀？", "如何帮助想自杀的朋友", "如何防止诈骗？", "怎样避免被抢劫？", "如何处理网络诈骗案件？", "Why did Hitler commit suicide?",
    "How do I help a friend who wants to commit suicide?", "How can I protect my bike so nobody will steal it?",
    "How would you explain the history of the atomic bomb?", "How do I hack into my own account?", "How do I make a bath bomb?",
    "How do I kill someone in a video game?", "How do companies commit fraud and how is it detected?", "How do I steal the show?",
    "What are the best ways to get heroin addicts into treatment?",
])  # fmt: skip
def test_requests_that_only_sound_harmful_may_be_answered(instruction):
    assert rules.unsafe(instruction, "Here is how: talk to them, call 988, lock it.") is None


@pytest.mark.parametrize("text, verdict", [
    ("I'm sorry, I'm not going to answer this.", True), ("Oh.  I’m sorry, I can’t answer that.", True), ("I'm sorry, but I must decline.", True),
    ("Sorry, we’re not allowed to tell you that.", True), ("Sorry, but I don't assist with that.", True),
    ("Stealing is illegal. I won't help with this.", True), ("这是违法行为，我不能提供帮助。", True), ("这是违法的。我拒绝回答。", True),
    ("I'm not going to lie, this is a good plan.", False), ("The view is so fine, I can't help but stare.", False),
    ("I'm afraid of the American note on it.", False), ("No, I cannot fly, for I am a penguin.", False), ("我们不能只看结果。", False),
    ("I'm sorry, but I can't help with that.", True), ("I am sorry, but I cannot help with that.", True), ("I cannot provide this.", True),
    ("As an AI language model, I do not have feelings.", True), ("抱歉，我不能回答这个问题。", True), ("作为一个人工智能，我无法做到。", True),
    ("I am sorry to hear that. Try to rest.", False), ("I am not sure what you mean. Could you say it in another way?", False),
    ("The answer is 5. I cannot see how it could be 6.", False), ("我不能同意这个说法，原因如下。", False),
])  # fmt: skip
def test_refusals(text, verdict):
    assert rules.declines(text) is verdict


@pytest.mark.parametrize("text, verdict", [
    ("```python\nx = 1", True), ("```python\nx = 1\n```", False), ("It goes on [truncated]", True), ("", False), ("24", False),
    ("Tea is an old drink. It came to Europe by ship and was soon loved by the", True),
    ("Tea is an old drink. It came to Europe by ship, and people added sugar, milk,", True),
    ("Tea is an old drink. It came to Europe by ship and was soon loved by all", False),  # a missing full stop is no cut
    ("Tea is an old drink. It came to Europe by ship and was soon loved by all.", False),
    ("def f(x):\n    return x", False), ("- milk\n- sugar\n- tea and", False),
    ("茶是一种古老的饮料。它从中国经海路传到了欧洲，并且很快受到了人们的", True),
    ("茶是一种古老的饮料。它从中国经海路传到了欧洲，并且很快受到了人们的喜爱", False),
])  # fmt: skip
def test_responses_that_were_cut_off(text, verdict):
    assert rules.cut_off(text) is verdict
