"""Writes instructions with program-checked constraints in IFEval's format, for training, dev and test.

    python -m experiments.instructions --out runs/study/instructions

Each asks for a short text about a topic and sets one or two of 15 constraints of IFEval (arXiv 2311.07911).
The files share forms and constraints but no topic. --seed determines everything.
"""

import argparse
import json
import random
from pathlib import Path

from core.files import atomic_write, cli
from core.flags import Parser, at_least

TOPICS = (
    "rain, bees, trains, honey, glaciers, violins, bread, deserts, chess, volcanoes, bicycles, owls, coffee, lighthouses, "
    "soccer, dinosaurs, libraries, the moon, sailing, tea, wolves, pottery, clouds, robots, apples, castles, whales, jazz, "
    "hiking, mirrors, cats, windmills, snow, pirates, gardens, photography, dolphins, cheese, maps, bridges, tigers, poetry, "
    "rivers, clocks, penguins, dancing, gold, kites, horses, cooking, elephants, paper, mountains, painting, ants, submarines, "
    "roses, swimming, candles, eagles, rice, magnets, beaches, letters, spiders, theatre, wheat, caves, turtles, airplanes, "
    "salt, forests, drums, frogs, museums, running, stars, chocolate, ice, camels, markets, silk, parrots, fishing, thunder, "
    "knitting, lions, tomatoes, ferries, comets, dogs, pianos, islands, soap, foxes, tennis, waterfalls, buttons, oranges, "
    "telescopes, monkeys, tunnels, birthdays, sharks, umbrellas, olives, marathons, puppets, geysers, butterflies, radios, "
    "canoes, squirrels, pumpkins, satellites, meadows, sheep, glass, festivals, fog, hats, rabbits, coins, harbours"
).split(", ")
FORMS = [
    "In two or three sentences, explain to a child what makes {} interesting.",
    "Write a short note to a friend about {}.",
    "Describe {} briefly.",
    "Give a short piece of advice about {}.",
    "Write a very short story about {}.",
    "Write a brief advertisement that has to do with {}.",
    "Name some facts about {} in a few sentences.",
    "Why do people like {}? Answer in a few sentences.",
]
WORDS = "always small light people world simple old bright quiet friend early strong warm home together".split()
ENDINGS = ["That is all there is to say.", "Thank you for reading!", "What do you think?", "I hope this helps."]


def constraint(name: str, rng: random.Random) -> tuple[str, dict]:
    """-> the sentence that asks for a constraint of IFEval, and the arguments of its check."""
    words, n = rng.sample(WORDS, 2), rng.randint
    few, many = n(2, 4), n(25, 45)
    return {
        "keywords:existence": (f'Use the words "{words[0]}" and "{words[1]}".', {"keywords": words}),
        "keywords:forbidden_words": (
            f'Do not use the words "the" or "{words[0]}".',
            {"forbidden_words": ["the", words[0]]},
        ),
        "keywords:frequency": (
            f'Use the word "{words[0]}" at least {few} times.',
            {"keyword": words[0], "relation": "at least", "frequency": few},
        ),
        "length_constraints:number_words": (
            f"Use less than {many} words.",
            {"relation": "less than", "num_words": many},
        ),
        "length_constraints:number_sentences": (
            f"Write at least {few + 2} sentences.",
            {"relation": "at least", "num_sentences": few + 2},
        ),
        "detectable_format:number_bullet_lists": (
            f"Answer with exactly {few} bullet points in markdown, such as * this is a point.",
            {"num_bullets": few},
        ),
        "detectable_format:number_highlighted_sections": (
            f"Highlight at least {few} parts with markdown, such as *highlighted part*.",
            {"num_highlights": few},
        ),
        "detectable_format:title": ("Begin with a title in double angular brackets, such as <<my title>>.", {}),
        "detectable_format:json_format": ("Give the entire answer as one JSON object.", {}),
        "startend:end_checker": (
            f'End with exactly this phrase: "{(end := rng.choice(ENDINGS))}"',
            {"end_phrase": end},
        ),
        "startend:quotation": ("Put the entire answer in double quotation marks.", {}),
        "change_case:english_capital": ("Write in English and in capital letters only.", {}),
        "change_case:english_lowercase": ("Write in English and in lowercase letters only.", {}),
        "punctuation:no_comma": ("Do not use any commas.", {}),
        "detectable_content:postscript": ("Add a postscript that begins with P.S.", {"postscript_marker": "P.S."}),
    }[name]


NAMES = (
    "keywords:existence keywords:forbidden_words keywords:frequency length_constraints:number_words "
    "length_constraints:number_sentences detectable_format:number_bullet_lists "
    "detectable_format:number_highlighted_sections detectable_format:title detectable_format:json_format "
    "startend:end_checker startend:quotation change_case:english_capital change_case:english_lowercase "
    "punctuation:no_comma detectable_content:postscript"
).split()
# A second constraint is one of these, whatever the first is. All pairs can be fulfilled together.
SECOND = ["keywords:existence", "length_constraints:number_words", "punctuation:no_comma"]
ALONE = ["detectable_format:json_format", "detectable_format:number_bullet_lists"]


def instruction(topic: str, rng: random.Random) -> dict:
    """A row in IFEval's format, without its key."""
    names = [rng.choice(NAMES)]
    second = rng.choice(SECOND)
    if names[0] not in ALONE and second != names[0] and rng.random() < 0.4:
        names.append(second)
    asked = [constraint(name, rng) for name in names]
    prompt = " ".join([rng.choice(FORMS).format(topic), *(sentence for sentence, _ in asked)])
    return {"prompt": prompt, "instruction_id_list": names, "kwargs": [kwargs for _, kwargs in asked]}


def write_instructions(out: str, sizes: dict[str, int], seed: int) -> None:
    """Writes OUT/NAME/ifeval/input_data.jsonl for each name of sizes. The names' topics are disjoint."""
    rng = random.Random(seed)
    topics = rng.sample(TOPICS, len(TOPICS))
    total, begin, key = sum(sizes.values()), 0, 0
    for name, size in sizes.items():
        end = begin + max(1, len(topics) * size // total)
        rows, seen = [], set()
        while len(rows) < size:
            row = instruction(rng.choice(topics[begin:end]), rng)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append({"key": (key := key + 1), **row})
        begin = end
        path = Path(out, name, "ifeval", "input_data.jsonl")
        with atomic_write(str(path)) as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
        print(f"wrote {path}: {size} instructions")


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--train", type=at_least(1), default=600, help="instructions for training")
    p.add_argument("--dev", type=at_least(1), default=150, help="for choosing settings")
    p.add_argument("--test", type=at_least(1), default=500, help="for testing")
    p.add_argument("--seed", type=int, default=0, help="random seed")
    args: argparse.Namespace = p.parse_args()
    write_instructions(args.out, {"train": args.train, "dev": args.dev, "test": args.test}, args.seed)


if __name__ == "__main__":
    cli(main)
