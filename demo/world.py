"""The demo's world: about fifty tasks with short instructions whose answers a program can check.

A seed determines everything. make_item() makes an instruction of a task (demo/tasks.py). parse_prompt() finds the task
of an instruction, for the teacher. reference() gives the value that check_reply() compares a reply with. A reply is
right, wrong, or has a fault of a poorly aligned model: it does not know, chats, repeats the question, or is off by one.

    python -m demo.world --out runs/demo/sources.jsonl      # instructions with original responses, some of them wrong
    python -m demo.world --heldout demo/heldout.jsonl       # the held-out instructions, which are committed
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
import hashlib
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from core.files import InputError, cli
from core.flags import Parser, file_out
from core.records import write_jsonl
from demo import words as W
from demo.tasks import RARE, TASKS, Task

MANNERS = {  # frames around an instruction; False: English, True: Chinese
    False: ("{}", "{}", "{} Answer briefly.", "Please help me. {}", "Here is a question. {}"),
    True: ("{}", "{}", "{}只写答案。", "请回答问题。{}"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Instructions and their answers


class Item(NamedTuple):
    task: Task
    slots: tuple
    wording: int  # index of the phrasing
    prompt: str


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= ch <= "\u9fff" for ch in text)


def make_item(task: Task, rng: random.Random) -> Item:
    """Makes an instruction of the task. rng draws the slots, the phrasing and the manner."""
    slots, wording = task.pick(rng), rng.randrange(len(task.phrasings))
    phrasing = task.phrasings[wording]
    manners = MANNERS[is_chinese(phrasing)]
    if "\n" in phrasing:  # text after the instruction would become part of its last line
        manners = [m for m in manners if m.endswith("{}")]
    return Item(task, slots, wording, rng.choice(manners).format(phrasing.format(**dict(zip("abcdef", slots)))))


def phrasing_patterns() -> list[tuple[Task, int, re.Pattern]]:
    """[(task, wording, pattern)] for every phrasing in every manner. The slots are named groups of the pattern."""
    out = []
    for task in TASKS + RARE:
        for wording, phrasing in enumerate(task.phrasings):
            seen, pattern = set(), ""
            for part in re.split(r"(\{[a-f]\})", phrasing):
                if not re.fullmatch(r"\{[a-f]\}", part):
                    pattern += re.escape(part)
                elif part in seen:
                    pattern += f"(?P={part[1]})"
                else:
                    seen.add(part)
                    pattern += f"(?P<{part[1]}>.+?)"
            for manner in sorted(set(MANNERS[is_chinese(phrasing)]), key=len, reverse=True):
                before, after = (re.escape(side) for side in manner.split("{}"))
                out.append((task, wording, re.compile(before + pattern + after)))
    return out


PATTERNS = phrasing_patterns()


def parse_prompt(prompt: str) -> Item | None:
    """Parses a prompt. None if it is not an instruction of this world."""
    for task, wording, pattern in PATTERNS:
        found = pattern.fullmatch(prompt.strip())
        if found:
            slots = tuple(value for _, value in sorted(found.groupdict().items()))
            try:
                task.answer(*slots)
            except (KeyError, ValueError, StopIteration):  # the phrasing matches, but not a word of this task
                continue
            return Item(task, slots, wording, prompt)
    return None


def right(item: Item) -> str:
    return item.task.answer(*item.slots)


def reference(item: Item) -> dict:
    """-> {"kind", "value"} for check_reply()."""
    kind, reply = item.task.kind, right(item)
    if kind == "number":
        value = re.findall(r"\d+", reply)[-1]
    elif kind == "choice":
        value = {"letter": reply[0], "choices": dict(zip("ABCD", item.slots))}
    elif kind == "code":
        name, n = item.slots[0], int(item.slots[1])
        value = {"tests": f"assert {name}(1) == {n + 1}\nassert {name}(-40) == {n - 40}", "entry_point": name}
    else:
        value = reply
    return {"kind": kind, "value": value}


# ---------------------------------------------------------------------------------------------------------------------
# Replies that are not right


def wrong(item: Item, rng: random.Random) -> str:
    """The answer to another question of the same task. For a choice, another choice of this question."""
    if item.task.kind == "choice":
        letter = rng.choice([ch for ch in "ABCD" if ch != right(item)[0]])
        return f"{letter}. {item.slots['ABCD'.index(letter)]}"
    while True:
        slots = item.task.pick(rng)
        other = item._replace(slots=slots if item.task.kind != "code" else (item.slots[0], slots[1]))
        if reference(other) != reference(item):
            return right(other)


def slip(item: Item) -> str:
    """A nearly right reply: off by one, the next letter, the opposite, or the last character missing."""
    reply, kind = right(item), item.task.kind
    if kind == "number":
        return re.sub(r"\d+(?=\D*$)", lambda m: str(int(m.group()) + 1), reply)
    if kind == "choice":
        letter = "ABCD"["ABCD".index(reply[0]) - 1]
        return f"{letter}. {item.slots['ABCD'.index(letter)]}"
    if kind == "code":
        return reply.replace("x + ", "x - ")
    swap = {"Yes": "No", "No": "Yes", "even": "odd", "odd": "even"}
    return swap.get(reply) or (reply[:-1] if len(reply) > 1 else reply + reply)


def chatty(item: Item) -> str:
    return ("好的!我的答案是:" if is_chinese(item.prompt) else "Sure! Here is my answer: ") + right(item)


def parrot(item: Item) -> str:
    return item.prompt.split("\n")[0]


def unsure(item: Item) -> str:
    return "抱歉,我不知道。" if is_chinese(item.prompt) else "Sorry, I do not know."


HABITS = {  # {kind: bad habits that make a reply of this kind wrong}
    "exact": (chatty, slip, unsure, parrot),
    "number": (slip, unsure),
    "choice": (slip, slip, unsure),
    "code": (slip, parrot, unsure),
}


def hash_share(*key: str | int) -> float:
    """A pseudo-random number in [0, 1) that depends only on the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "big") / 2**48


def habitual(item: Item) -> str:
    """A reply with the bad habit of this task and wording."""
    habits = HABITS[item.task.kind]
    return habits[int(hash_share("habit", item.task.name, item.wording) * len(habits))](item)


def raw_reply(item: Item, rng: random.Random, low: float = 0.15, high: float = 0.85) -> str:
    """A reply for the base model's corpus: right or a bad habit. The wording sets the share of bad ones, low to high."""
    bad = low + (high - low) * hash_share("bad", item.task.name, item.wording)
    return habitual(item) if rng.random() < bad else right(item)


# ---------------------------------------------------------------------------------------------------------------------
# The files


def item_key(item: Item) -> tuple:
    """The key of an instruction. Held-out instructions and others never share one.

    It leaves out the wording, except for a short list of facts (task.closed).
    """
    return (item.task.name, item.slots, item.wording) if item.task.closed else (item.task.name, item.slots)


def make_heldout(seed: int = 20241102, per_task: int = 12) -> dict[tuple, Item]:
    """The held-out items: per_task of every task that can be scored without running code."""
    rng, items = random.Random(seed), {}
    for task in TASKS:
        if task.kind == "code":
            continue
        mine = {}
        while len(mine) < per_task:
            item = make_item(task, rng)
            mine[item_key(item)] = item
        items.update(mine)
    return items


def heldout_rows(items: dict[tuple, Item]) -> Iterator[dict]:
    for i, item in enumerate(items.values()):
        yield {"id": f"demo-{i:04d}", "task": item.task.name, "prompt": item.prompt, "reference": reference(item)}


def training_items(rng: random.Random, heldout: dict[tuple, Item], tasks: list[Task] = TASKS) -> Iterator[Item]:
    """Yields endless items that are not held out, from all tasks in turn."""
    while True:
        for task in rng.sample(tasks, len(tasks)):
            item = make_item(task, rng)
            while item_key(item) in heldout:
                item = make_item(task, rng)
            yield item


def original(item: Item, rng: random.Random) -> str:
    """An original response as in open data sets: about half are right, the others wrong or sloppy."""
    draw = rng.random()
    if draw < 0.55:
        return right(item)
    return wrong(item, rng) if draw < 0.75 else slip(item) if draw < 0.85 else habitual(item)


def as_record(item: Item, reply: str, rng: random.Random, verifiable: float = 0.7) -> dict:
    """A record in one of the formats of data sets. verifiable: share of the records that have a reference."""
    instruction, _, rest = item.prompt.partition("\n")
    if rest:
        record = {"instruction": instruction, "input": rest, "output": reply}
    elif rng.random() < 0.5:
        record = {"prompt": item.prompt, "completion": reply}
    else:
        turns = [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": reply}]
        record = {"messages": turns}
    if rng.random() < verifiable:
        record["reference"] = reference(item)
    return record


def make_sources(seed: int, n: int, heldout: dict[tuple, Item]) -> list[dict]:
    """About n shuffled records: distinct instructions, near duplicates, rare tasks, unsafe and broken ones."""
    rng, items = random.Random(seed), {}
    stream = training_items(rng, heldout)
    for _ in range(20 * n):  # the short lists of facts run out of distinct wordings first
        item = next(stream)
        items.setdefault(item.prompt, item)
        if len(items) == n:
            break
    records = [as_record(item, original(item, rng), rng) for item in items.values()]
    for item in rng.sample(list(items.values()), n // 25):  # near duplicates: only spaces and punctuation differ
        near = item._replace(prompt=rng.choice(["{} ", "{}!", " {}", "{}\n"]).format(item.prompt).replace(" ", "  ", 1))
        records.append({"prompt": near.prompt, "completion": original(item, rng)})
    for task in RARE:
        records += [as_record(item, right(item), rng) for item in (make_item(task, rng) for _ in range(7))]
    records += [{"instruction": q, "input": "", "output": a} for q, a in W.UNSAFE.items()]
    for item in rng.sample(list(items.values()), 12):  # broken: no response, no instruction, cut off
        broken = rng.choice([(item.prompt, ""), (" ", right(item)), (item.prompt, "```python\n" + right(item)[:3])])
        records.append(dict(zip(("prompt", "completion"), broken)))
    rng.shuffle(records)
    return records


def main() -> None:
    p = Parser(description=__doc__)
    ours, ours_held_out = file_out("Pick the right answer"), file_out('"task"')  # text that identifies our own files
    p.add_argument("--out", type=ours, help="write the instructions with original responses to this JSON Lines file")
    p.add_argument("--heldout", type=ours_held_out, help="write the held-out instructions to this JSON Lines file")
    p.add_argument("--n", type=int, default=3200, help="number of distinct instructions in --out")
    p.add_argument("--seed", type=int, default=0, help="random seed of --out; the held-out set has a fixed one")
    args = p.parse_args()
    if not (args.out or args.heldout):
        raise InputError("nothing to write: give --out FILE or --heldout FILE")
    heldout = make_heldout()
    if args.heldout:
        write_jsonl(args.heldout, heldout_rows(heldout))
        print(f"wrote {len(heldout)} held-out instructions to {args.heldout}")
    if args.out:
        records = make_sources(args.seed, args.n, heldout)
        write_jsonl(args.out, records)
        print(f"wrote {len(records)} instructions of {len(TASKS)} tasks to {args.out}")
        print(
            f"next: python make_data.py --sources {args.out} --teacher URL --small demo/base; the whole demo: bash run.sh"
        )


if __name__ == "__main__":
    cli(main)
