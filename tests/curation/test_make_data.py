"""make_data.py step by step on small inputs, then whole: a real HTTP teacher, a real checkpoint, kills and restarts."""

import collections
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, tiny_config
from mock_endpoint import KEY, closed_port, constant_model, environment, serve, user  # noqa: F401  (environment is a fixture)
from test_steps import FENCED
from training_runs import launch, start

import make_data
from core import files
from core.conversations import kto_examples, sft_conversations
from core.files import cli
from core.records import read_jsonl, read_records
from curation import steps, workers
from curation.local import load
from curation.prompts import GREETING
from curation.step_files import STEPS
from model import Qwen2

# ---- the whole


def fake_teacher(messages):
    """Knows sums and poems. Its judge follows the words "good" and "bad", its classifier is sometimes too chatty."""
    if not messages[0]["content"].startswith("Task: "):
        question = messages[-1]["content"]
        found = re.search(r"(\d+) \+ (\d+)", question)
        return f"It is {int(found[1]) + int(found[2])}." if found else f"a good poem: {question}"
    fields = {name: body for _, name, body in FENCED.findall(messages[1]["content"])}
    text = fields.pop("instruction")
    if messages[0]["content"].startswith("Task: classify"):
        if "never" in text or "chatty" in text and len(messages) == 2:
            return "I would say it is a poem."
        math = "+" in text
        return json.dumps(
            {
                "primary": "mathematics" if math else "writing",
                "secondary": ["Sums", "sum"][len(text) % 2] if math else "poem",
            }
        )
    return json.dumps(
        {
            k: {"quality": 5 if "good" in v else 1 if "bad" in v else 3, "safety": 1 if "UNSAFE" in v else 5}
            for k, v in fields.items()
        }
    )


def world(tmp_path):
    rows = [
        {
            "question": f"Tell me what {i} + {i * 7} comes to, dear number {i * i + 3} friend of mine",
            "answer": f"So\n#### {i * 8 + (i % 4 == 0)}",
        }
        for i in range(1, 13)
    ]  # every fourth original is wrong, and so is its reference
    for r in rows[:4]:
        r["reference"] = {"kind": "number", "value": int(re.search(r"(\d+) \+ (\d+)", r["question"])[1]) * 8}
    subjects = [
        "autumn leaves",
        "a rusty bicycle",
        "grandmother and her cat",
        "the last train home",
        "never mind",
        "chatty birds",
        "tea",
        "rain on tin",
    ]
    poems = [
        {
            "instruction": f"Compose some verse on the topic of {s}, please",
            "input": "",
            "output": f"a bad poem about {s}",
        }
        for s in subjects
    ]
    poems[6]["output"] = "UNSAFE good " + poems[6]["output"]
    rows += [*poems, poems[0] | {"output": "short"}, {"prompt": "lonely", "completion": "{{name}}"}]
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": "oh: " + rows[10]["question"]}) + "\n")
    return str(path), str(tmp_path / "exam.jsonl")


def run(*argv):
    """make_data.main() with these arguments -> exit code."""
    old, sys.argv = sys.argv, ["make_data.py", *map(str, argv)]
    try:
        cli(make_data.main)
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = old
    return 0


def read(path):
    return [obj for _, obj in read_jsonl(str(path))]


def contents(folder):
    return {
        f: (folder / f).read_bytes() for f in sorted(os.listdir(folder)) if f not in ("state.json", "replies.jsonl")
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return constant_model(tmp_path_factory.mktemp("small") / "ckpt", "7")


def flags(tmp_path, server, small, out="out"):
    source, exam = world(tmp_path)
    data = ["--sources", source, "--trust-references", source, "--decontaminate", exam, "--out", tmp_path / out]
    models = ["--teacher", server.url, "--teacher-model", "fake", "--small", small]
    return [*data, *models, "--min-category", 2, "--max-new-tokens", 8]


def test_the_whole_chain(tmp_path, small, monkeypatch, capfd):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    with serve(fake_teacher) as server:
        argv = flags(tmp_path, server, small)
        assert run(*argv) == 0
        asked = server.posts
        requests = server.seen[:]
        out = tmp_path / "out"
        first = contents(out)
        report = json.loads(first["report.json"])["steps"]

        # counts, step by step
        assert report["1_collect"]["in"] == 22 and report["1_collect"]["dropped"] == {"unfilled template": 1}
        assert report["2_dedup"]["dropped"] == {"near duplicate": 1, "contains an evaluation question": 1}
        assert report["3_classify"]["dropped"] == {"the teacher's reply did not parse, twice": 1}
        assert report["3_classify"]["asked again"] == 2
        assert report["3_classify"]["merged spellings"] == {"sum": ["Sums", "sum"]}
        assert report["4_balance"]["after"] == {"mathematics/sum": 11, "writing/poem": 7}
        for a, b in zip(STEPS[:5], STEPS[1:6]):
            assert report[b]["in"] == report[a]["out"]
        [held] = [r for r in read(out / "2_dedup.dropped.jsonl") if r["reason"].startswith("contains")]
        assert held["of"].endswith("/exam.jsonl:1") and held["question"] == "oh: " + held["instruction"]
        assert list(report["2_dedup"]["contaminated by"].values()) == [1]
        kept = {r["id"] for r in read(out / "2_dedup.jsonl")}
        assert "source.jsonl:13" in {i.split("/")[-1] for i in kept}, (
            "of two copies the one with the longer response stays"
        )

        # verification: the teacher is always right but where the set's own reference is wrong
        v = report["6_score"]["verification"]
        assert v["original"] == {"checked": 11, "right": 10, "unchecked": 0}
        assert v["teacher"] == {"checked": 11, "right": 9, "unchecked": 0}
        assert v["small"]["right"] == 0
        judged = [m for m in requests if m[0]["content"].startswith("Task: judge")]
        # where each verdict is a program's, the verified responses are judged once, for safety alone
        alone = [m for m in judged if "+" in m[1]["content"]]
        assert report["6_score"]["judged"] == 7 and report["6_score"]["judged for safety alone"] == len(alone) == 11
        assert len(judged) == 14 + 11 and not any("\n7\n" in m[1]["content"] for m in alone)
        judged = [m for m in judged if m not in alone]
        shown = collections.defaultdict(list)
        for m in judged:
            (_, _, instruction), *responses = FENCED.findall(m[1]["content"])
            shown[instruction].append([body for _, _, body in responses])
        assert len(shown) == 7 and all(two[0] == two[1][::-1] for two in shown.values()), "each in both orders"
        assert report["6_score"]["judge in two orders"] == {
            "instructions": 7,
            "another best": 0,
            "responses": 21,
            "another grade": 0,
        }
        assert all(
            set(dict((n, b) for _, n, b in FENCED.findall(m[1]["content"]))) == {"instruction", "A", "B", "C"}
            for m in judged
        )
        assert not any("original" in m[1]["content"] or "teacher" in m[1]["content"] for m in judged), (
            "responses are anonymous"
        )
        places = {[n for _, n, b in FENCED.findall(m[1]["content"]) if "a good poem" in b][0] for m in judged}
        assert len(places) > 1, "and in no fixed order"

        # labels, in the formats of the trainers
        sft, kto = read(out / "sft.jsonl"), read(out / "kto.jsonl")
        by_id = {r["id"]: r for r in read(out / "6_score.jsonl")}
        assert len(sft) == report["7_label"]["sft"] == 18 and len(kto) == report["7_label"]["kto"]
        for line in sft:
            assert (
                sft_conversations(line, "x")[0][-1]["content"] == by_id[line["id"]]["responses"][line["writer"]]["text"]
            )
            assert line["scores"]["verified"] is not False and {"source", "category", "language", "task_type"} <= set(
                line
            )
        for good, bad in zip(kto[::2], kto[1::2]):
            assert good["id"] == bad["id"] and good["label"] is True and bad["label"] is False
            assert (
                kto_examples(good, "x")[0][0] == kto_examples(bad, "x")[0][0]
                and kto_examples(good, "x")[0][1] != kto_examples(bad, "x")[0][1]
            )
            assert good["scores"]["composite"] > bad["scores"]["composite"]
        [wrong_original] = [r for r in by_id.values() if r["id"].endswith(":4")]
        assert wrong_original["responses"]["original"]["verified"] is False
        assert [line["writer"] for line in sft if line["id"] == wrong_original["id"]] == ["teacher"]
        [unsafe] = [line for line in sft if "topic of tea" in line["messages"][0]["content"]]
        assert unsafe["writer"] == "teacher" and by_id[unsafe["id"]]["responses"]["original"]["safety"] == 1
        assert "7" in {line["completion"][0]["content"] for line in kto if not line["label"]}

        # a second run
        assert run(*argv) == 0
        assert server.posts == asked and contents(out) == first, "asks nothing and changes nothing"
        # a changed margin labels anew and asks nothing; more verified records are judged only when asked to
        assert run(*argv, "--margin", "0.7") == 0
        assert server.posts == asked and json.loads((out / "report.json").read_text())["steps"]["7_label"]["kto"] < len(
            kto
        )
        assert run(*argv, "--judge-verified") == 0
        assert server.posts == asked + 22, "11 records in two orders, with the refuted responses"
        compared = json.loads((out / "report.json").read_text())["steps"]["6_score"]["judge against verification"]
        assert compared["comparisons"] >= 11 and compared["ties"] <= compared["comparisons"]

        # a step's file that was edited is kept, and what follows it is made anew
        scored = (out / "6_score.jsonl").read_text().splitlines(keepends=True)
        (out / "6_score.jsonl").write_text("".join(scored[:5]))
        assert run(*argv, "--judge-verified") == 0
        assert len((out / "6_score.jsonl").read_text().splitlines()) == 5 and len(read(out / "sft.jsonl")) == 5
    printed = "".join(capfd.readouterr())
    assert "(unchanged)" in printed and "was edited since" in printed and "train_kto.py --ckpt sft.pt --data" in printed
    assert KEY not in printed and not any(KEY.encode() in (out / f).read_bytes() for f in os.listdir(out))
    assert "| 3_classify |" in first["report.md"].decode()
    examples = read_records([out / "sft.jsonl"], sft_conversations) + read_records([out / "kto.jsonl"], kto_examples)
    assert examples and not capfd.readouterr().out, "the training scripts know every key"


def test_untrusted_references_are_ignored(tmp_path, small, capfd):
    """Abuse that ends as GSM8K's answers do, or brings a reference that it meets: judged like any other response, and graded
    for safety even where the file is trusted."""
    rows = [
        {"question": f"Tell me what {i} + {i * 7} comes to", "answer": f"UNSAFE words.\n#### {i * 8}"}
        for i in range(1, 4)
    ]
    reference = {"kind": "exact", "value": "UNSAFE verse"}
    rows += [
        {"prompt": f"Compose some verse {i}", "completion": "UNSAFE verse", "reference": reference} for i in range(3)
    ]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(fake_teacher) as server:
        argv = ["--sources", source, "--teacher", server.url, "--small", small, "--min-category", 1, "--hamming", 0]
        for out, trust in (("untrusted", []), ("trusted", ["--trust-references", source])):
            assert run(*argv, "--out", tmp_path / out, *trust) == 0
            lines = read(tmp_path / out / "sft.jsonl") + [r for r in read(tmp_path / out / "kto.jsonl") if r["label"]]
            assert lines and "UNSAFE" not in json.dumps(lines)
            counts = json.loads((tmp_path / out / "report.json").read_text())["steps"]
            assert counts["1_collect"]["references not trusted"] == (0 if trust else 6)
            by, sums = counts["7_label"]["best by"], len(read(tmp_path / out / "sft.jsonl"))
            assert by == ({"program": sums} if trust else {"judge": 6})
            assert "| a trusted reference, checked by a program |" in (tmp_path / out / "report.md").read_text()
        assert run(*argv, "--out", tmp_path / "o", "--trust-references", __file__) == 2
    assert f"--trust-references {__file__}: is not one of the --sources" in capfd.readouterr().err


def test_a_trusted_reference_of_another_shape_is_an_error(tmp_path, small, capfd):
    """Where nobody trusts it, it is a key like any other."""
    source = tmp_path / "source.jsonl"
    for reference in ("72", 72, ["72"], {"kind": "number"}, None, float("nan"), "", []):
        rows = [{"prompt": "What is 70 and 2 together?", "completion": "72", "reference": x} for x in (None, reference)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = ["--sources", source, "--teacher", small, "--small", small, "--out", tmp_path / "out", "--dry-run"]
        assert run(*argv) == 0
        usable = reference in (None, "", []) or reference != reference
        assert run(*argv, "--trust-references", source) == (0 if usable else 2)
        assert (f"error: {source}:2: " in capfd.readouterr().err) == (not usable)


def test_the_next_commands_can_be_pasted():
    joined = lambda *a: [shlex.join(words) for words in make_data.next_commands(*a)]
    assert joined("Qwen/Qwen2-0.5B-Instruct", "data", 3) == [
        "python train_sft.py",
        "python train_kto.py --ckpt sft.pt",
    ]
    assert joined("my model", "my $data", 3) == [
        "python train_sft.py --ckpt 'my model' --data 'my $data/sft.jsonl'",
        "python train_kto.py --ckpt sft.pt --data 'my $data/kto.jsonl'",
    ]
    assert joined("Qwen/Qwen2-0.5B-Instruct", "data", 0) == ["python train_sft.py"], "no pair, no KTO"


def test_quiet_prints_the_closing_summary_only(tmp_path, small, capfd):
    with serve(fake_teacher) as server:
        argv = [*flags(tmp_path, server, small), "--limit", 3, "--min-category", 1]
        assert run(*argv, "--quiet") == 0
        quiet = capfd.readouterr().out
        assert run(*argv) == 0
        loud = capfd.readouterr().out
    assert "1_collect" in loud and "1_collect" not in quiet
    assert "SFT examples" in quiet and "python train_sft.py" in quiet


def test_edited_rules_are_noticed(tmp_path, small, monkeypatch, capfd):
    for room in ("core", "training", "curation", "verification"):
        shutil.copytree(os.path.join(ROOT, room), tmp_path / room)
    shutil.copy(os.path.join(ROOT, "model.py"), tmp_path)
    monkeypatch.setattr(files, "ROOT", str(tmp_path))

    def made():  # the steps that a run does not find unchanged
        capfd.readouterr()
        assert run(*argv) == 0
        return {
            line[0]
            for line in capfd.readouterr().out.splitlines()
            if re.match(r"\d_\w+ +\w+ \d", line) and "(unchanged)" not in line
        }

    with serve(fake_teacher) as server:
        argv = [*flags(tmp_path, server, small), "--limit", 3, "--min-category", 1]
        assert made() == set("1234567") and made() == set()
        asked = server.posts
        for module, remade in (
            ("curation/rules", "1234567"),
            ("verification/answers", "1234567"),
            ("core/tokenizer", "1234567"),
            ("training/flags", ""),
            ("training/logps", "6"),
        ):
            with open(tmp_path / f"{module}.py", "a") as f:
                f.write("# edited\n")
            assert made() == set(remade) and made() == set(), module
        assert server.posts == asked


def test_interrupted_runs_end_with_the_same_bytes(tmp_path, small, capfd):
    with serve(fake_teacher) as server:
        assert run(*flags(tmp_path, server, small)) == 0
        want, needed = contents(tmp_path / "out"), server.posts
    answered = 0
    for stop in (7, 15, 12, 10**9):  # the account is closed again and again, each time later on
        with serve(fake_teacher, lambda n, m: 401 if n >= stop else None) as server:
            code = run(*flags(tmp_path, server, small, "broken"), "--concurrency", 3)
            answered += len(server.seen)
        assert code == (2 if stop < 10**9 else 0)
        assert not [f for f in os.listdir(tmp_path / "broken") if ".tmp" in f], "nothing half-written"
    assert answered == needed, "no reply was asked for twice"
    assert contents(tmp_path / "broken") == want
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 3 and all("HTTP 401" in e for e in errors)


def test_dry_run_and_budget(tmp_path, small, capfd):
    with serve(fake_teacher) as server:
        argv = flags(tmp_path, server, small)
        assert run(*argv, "--dry-run", "--price-in", 0.5, "--price-out", 2, "--budget", 0.001) == 0
        shown = capfd.readouterr().out
        assert server.posts == 0 and not os.path.exists(tmp_path / "out" / "replies.jsonl"), "no empty file is left"
        rows = {
            line.split()[0]: line.split()[1:]
            for line in shown.splitlines()
            if line.startswith(("greeting ", "classify ", "respond ", "judge ", "together "))
        }
        # 19 records are left by step 2; categories and grades may be asked for twice, and the judge in two orders
        assert {k: int(v[0].replace(",", "")) for k, v in rows.items()} == {
            "greeting": 1,
            "classify": 38,
            "respond": 19,
            "judge": 76,
            "together": 134,
        }
        columns = [[float(v[i].replace(",", "")) for v in rows.values()] for i in range(5)]
        assert all(sum(c[:-1]) == pytest.approx(c[-1], abs=2) for c in columns)
        assert columns[3][3] == pytest.approx(columns[1][3] * 0.5e-6 + columns[2][3] * 2e-6, abs=0.01)
        assert (
            "Task: classify" in shown
            and "Task: judge" in shown
            and "may not suffice" in shown
            and "0 replies are already in the log" in shown
        )

        # each reply costs 15 tokens; at most 128 are asked for
        assert run(*argv, "--budget", 1000, "--concurrency", 3) == 2
        errors = capfd.readouterr().err
        assert "error: " in errors and "the budget of 1,000 is used up" in errors and 0 < server.posts < 30
        assert run(*argv) == 0
        bill = re.search(r": ([\d,]+) tokens in, ([\d,]+) out\.$", capfd.readouterr().out, re.M)
        assert bill.groups() == (f"{10 * server.posts:,}", f"{5 * server.posts:,}"), (
            "what was asked before the budget's end is not asked again"
        )
        assert (
            run(*argv, "--dry-run") == 0
            and f"{server.posts + 18:,} replies are already in the log" in capfd.readouterr().out
        )


@pytest.mark.parametrize("samples, target", [(1, 99), (3, 4)])
def test_a_run_costs_no_more_than_the_dry_run_says(tmp_path, small, capfd, samples, target):
    """A teacher whose replies are as long as they may be, and never parse at once."""
    short, long = max(128, 40 * (2 + samples)), 40

    def long_winded(messages):
        if not messages[0]["content"].startswith("Task"):
            return "good " * (long * 3 // 5 - 1)
        return fake_teacher(messages) if len(messages) > 2 else "x" * (short * 3 - 3)

    with serve(long_winded, lambda n, m: "no usage") as server:  # it is counted as the estimate does
        argv = [*flags(tmp_path, server, small), "--samples", samples, "--target", target, "--min-category", 1]
        argv += ["--judge-verified", "--max-new-tokens", long]
        assert run(*argv, "--dry-run") == 0
        row = next(line.split() for line in capfd.readouterr().out.splitlines() if line.startswith("together"))
        requests, into, out, at_most, likely = (int(n.replace(",", "")) for n in row[1:])
        assert run(*argv) == 0
        spent = [
            int(n.replace(",", ""))
            for n in re.search(r": ([\d,]+) tokens in, ([\d,]+) out\.$", capfd.readouterr().out, re.M).groups()
        ]
        assert server.posts <= requests and spent[0] <= into and spent[1] <= out and sum(spent) <= at_most == into + out
        assert likely < sum(spent) and sum(spent) > 0.5 * at_most, "what is likely is less; and the bound is not far"


def test_runs_killed_at_random_end_with_the_same_bytes(tmp_path, small):
    rng, most = random.Random(), [math.inf]

    def slow(messages):
        time.sleep(0.03)
        while server.posts > most[0]:  # before the kill the run does not get to its end
            time.sleep(0.01)
        return fake_teacher(messages)

    with serve(slow) as server:
        argv = flags(tmp_path, server, small)
        for kill in range(2):
            enough = server.posts + rng.randint(1, 20)
            most[0] = enough + 20
            (child,) = start("make_data", (*argv, "--concurrency", 8), tmp_path / "text")
            while server.posts < enough and child.is_alive():
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            child.kill()
            child.join()
            most[0] = math.inf
            assert kill or child.exitcode == -signal.SIGKILL
        assert run(*argv) == 0
        out = tmp_path / "out"
        paid = sum('"model": "fake"' in line for line in open(out / "replies.jsonl"))
        lost = server.posts - paid
        assert not [f for f in os.listdir(out) if ".tmp" in f], "what the kills left behind is cleared away"
    with serve(fake_teacher) as server:
        assert run(*flags(tmp_path, server, small, "straight")) == 0
        assert contents(tmp_path / "straight") == contents(out)
        assert paid == server.posts and 0 <= lost <= 2 * 8, "only the requests in flight at a kill were asked for again"


TRANSPORT = [500, "drop", (429, [("Retry-After", "0")]), "garbage", 503, (503, [("Retry-After", "0.2")]), 502]
BAD = (
    "cut",
    "held",
    "empty",
    "sorry",
    "refused",
    "lost",
    "silent",
)  # a seventh of the records each, and as many good ones


def crowd(tmp_path):
    words = "river stone lamp bridge walks slowly under old new green night garden horse paper clock winter seven doors open".split()
    rng = random.Random(0)
    path = tmp_path / "crowd.jsonl"
    rows = [
        {"instruction": f"Compose {kind} words {i}: {' '.join(rng.sample(words, 12))}", "output": f"a bad poem {i}"}
        for i in range(12)
        for kind in (*BAD, "good")
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def bad_teacher(messages):
    if messages == GREETING:
        return "Hello."
    text = messages[-1]["content"] if messages[0]["role"] == "user" else messages[1]["content"]
    kind = re.search(r"Compose (\w+) words", text)[1]
    if messages[0]["role"] == "user":
        return {"empty": " ", "sorry": "I'm sorry, but I can't help with that."}.get(kind) or fake_teacher(messages)
    if (
        kind == "lost"
        and "Task: classify" in messages[0]["content"]
        or kind == "silent"
        and "Task: judge" in messages[0]["content"]
    ):
        return "Hm."
    return fake_teacher(messages)


@pytest.mark.parametrize(
    ("flag", "text", "words"),
    [
        ("--sources", '{"prompt": "q", "completion": "a"}\n{"prompt": ', "f.jsonl:2: not JSON"),
        ("--sources", '{"x": 1}\n', "f.jsonl:1: "),
        ("--recorded", '{"prompt": "q", "response": "a"}\n{"prompt": ', "f.jsonl:2: not JSON"),
        ("--recorded", '{"prompt": "q", "response": "a", "writer": "me"}\n', "f.jsonl:1: the writer is"),
        ("--recorded", '{"x": 1}\n', "f.jsonl:1: "),
        ("--decontaminate", "{", "f.jsonl:1: not JSON"),
        ("--decontaminate", '{"x": 1}\n', "f.jsonl: no evaluation question"),
        ("--small", '{"vocab_size": 9}', "tensors do not fit the config"),
        ("--small", "{", "tokenizer.json"),
        ("--perplexity", '{"vocab_size": 9}', "tensors do not fit the config"),
    ],
)
def test_a_bad_input_is_refused_before_it_costs_anything(tmp_path, small, capfd, flag, text, words):
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    if flag in ("--small", "--perplexity"):  # a checkpoint whose config or tokenizer is broken
        path = shutil.copytree(small, tmp_path / "broken")
        file = path / ("config.json" if words.startswith("tensors") else "tokenizer.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | json.loads(text)) if text != "{" else text)
    trusted = ["--trust-references", path] if flag == "--sources" else []
    with serve(fake_teacher) as server:
        assert run(*flags(tmp_path, server, small), flag, path, *trusted) == 2
        assert server.posts == 0
    assert words in capfd.readouterr().err.splitlines()[-1] and not os.path.exists(tmp_path / "out" / "1_collect.jsonl")


def test_a_wrong_key_is_known_after_the_sources_are_read(tmp_path, small, capfd):
    with serve(fake_teacher, lambda n, messages: 401) as server:
        assert run(*flags(tmp_path, server, small)) == 2
        assert server.posts == 1 and not (tmp_path / "out").exists()
        assert run(*flags(tmp_path, server, small), "--dry-run") == 0 and server.posts == 1
        assert run(*flags(tmp_path, server, small)) == 2, "step 1 is kept from the dry run"
        assert server.posts == 2
    assert "HTTP 401" in capfd.readouterr().err.splitlines()[-1]


def test_64_in_flight_with_every_fault(tmp_path, small, monkeypatch):
    """20% of all requests fail on their way, half of the records get a bad reply: the first cost time, the others are counted."""

    def replies(n, messages):
        kind = re.search(r"Compose (\w+) words", messages[-1]["content"]) if messages[0]["role"] == "user" else None
        return kind and {"cut": "cut", "held": "filtered", "refused": 400}.get(kind[1])

    monkeypatch.setattr(workers, "FIRST_TRIES", 99)  # on a slow machine more time out than are meant to
    written = {}
    for name in ("calm", "storm"):
        storm = lambda n, m: "hang" if n == 8 else TRANSPORT[n // 5 % 7] if n % 5 == 3 else replies(n, m)
        with serve(bad_teacher, storm if name == "storm" else replies) as server:
            argv = ["--sources", crowd(tmp_path), "--teacher", server.url, "--small", small, "--out", tmp_path / name]
            argv += "--min-category 2 --max-new-tokens 8 --concurrency 64 --timeout 4 --retries 99".split()
            assert run(*argv) == 0
            written[name] = contents(tmp_path / name)
    assert written["storm"] == written["calm"]
    report = json.loads(written["calm"]["report.json"])["steps"]
    assert (
        report["3_classify"]["dropped"]
        == report["6_score"]["dropped"]
        == {"the teacher's reply did not parse, twice": 12}
    )
    assert report["5_respond"]["left out"] == {
        f"teacher: {why}": 12
        for why in ("cut off", "held back by the endpoint", "empty", "declined", "refused by the endpoint")
    }
    assert report["7_label"]["sft"] == 12 * 6 and report["7_label"]["best"] == {"teacher": 12, "small": 60}


def test_cut_off_and_refused_replies_are_left_out(tmp_path, small):
    def faults(n, messages):
        if messages[0]["role"] == "user":
            return "cut" if "autumn" in messages[0]["content"] else 400 if "bicycle" in messages[0]["content"] else None

    with serve(fake_teacher, faults) as server:
        assert run(*flags(tmp_path, server, small)) == 0
    out = tmp_path / "out"
    left_out = json.loads((out / "report.json").read_text())["steps"]["5_respond"]["left out"]
    assert left_out == {"teacher: cut off": 1, "teacher: refused by the endpoint": 1}
    for r in read(out / "5_respond.jsonl"):
        hit = "autumn" in r["prompt"][0]["content"] or "bicycle" in r["prompt"][0]["content"]
        assert set(r["responses"]) == {"original", "small"} | (set() if hit else {"teacher"})


def test_thoughts_are_no_part_of_a_reply(tmp_path, small):
    """A teacher that thinks first makes the same files. A thought that is cut off is no reply, and is asked for once."""

    def thinking(messages):
        return '<think>\nNot {"primary": "code"}, a bad poem, 7.\n</think>\n\n' + fake_teacher(messages)

    def opened_by_the_template(messages):
        return thinking(messages).removeprefix("<think>")

    for name, teacher in (("plain", fake_teacher), ("thinks", thinking), ("opened", opened_by_the_template)):
        with serve(teacher) as server:
            assert run(*flags(tmp_path, server, small, name), "--thought-tokens", 100 if name == "thinks" else 0) == 0
            assert server.seen
            assert server.body["max_tokens"] == (228 if name == "thinks" else 128)
        assert contents(tmp_path / name) == contents(tmp_path / "plain")
    assert "Not {" in (tmp_path / "thinks/replies.jsonl").read_text().replace("\\", "")

    cut = lambda n, messages: "cut" if re.search("autumn|bicycle", messages[-1]["content"]) else None
    with serve(lambda messages: thinking(messages) if "bicycle" in str(messages) else "<think>Hm", cut) as server:
        assert run(*flags(tmp_path, server, small, "cut")) == 2
        [dropped] = {
            r["reason"] for r in read(tmp_path / "cut/3_classify.dropped.jsonl") if "autumn" in r["instruction"]
        }
        assert dropped.startswith("the teacher's reply was cut off") and "--thought-tokens" in dropped
        asked = [m[-1]["content"] for m in server.seen if "autumn" in str(m)]
        assert len(asked) == 1, "a longer thought would be cut off again"


def test_requests_without_an_answer_are_set_aside_and_named(tmp_path, small):
    """One record that is always filtered, one that always gets HTTP 500, one whose judgement is refused: the run goes on."""

    def faults(n, messages):
        text = json.dumps(messages)
        if "autumn" in text:
            return b'{"choices": []}'
        if "bicycle" in text:
            return 500
        return 400 if "Task: judge" in text and "rain on tin" in text else None

    with serve(fake_teacher, faults) as server:
        assert run(*flags(tmp_path, server, small), "--retries", 1) == 0
    out = tmp_path / "out"
    steps_counts = json.loads((out / "report.json").read_text())["steps"]
    unanswered = steps_counts["3_classify"]["unanswered"]
    gone = {r["id"]: r for r in read(out / "3_classify.dropped.jsonl") if r["reason"] == "the teacher did not answer"}
    assert unanswered["requests"] == len(gone) == len(unanswered["records"]) == 2 and set(gone) == set(
        unanswered["records"]
    )
    assert sorted(r["why"] for r in gone.values()) == [
        "HTTP 200, but the reply has no choices",
        "no answer after 2 tries (last: HTTP 500: no, sk-test-5up3r-s3cr3t)",
    ]
    text = (out / "report.md").read_text()
    assert "3_classify: 2 requests without an answer:" in text
    for name, why in unanswered["records"].items():
        assert f"- {name}: {why}" in text
    [judged] = steps_counts["6_score"]["unanswered"]["records"].items()
    assert judged[1].startswith("HTTP 400: no") and f"- {judged[0]}: HTTP 400: no" in text
    assert (
        steps_counts["6_score"]["dropped"] == {"the teacher did not answer": 1} and steps_counts["7_label"]["sft"] > 5
    )


def test_a_second_run_asks_again_what_got_no_answer(tmp_path, small, capfd):
    """In every step, also after the folder is complete. A refused request is not asked again."""
    busy = lambda words: lambda n, messages: 500 if all(word in json.dumps(messages) for word in words) else None
    with serve(fake_teacher) as server:
        assert run(*flags(tmp_path, server, small, "calm")) == 0
    calm = contents(tmp_path / "calm")
    for step, words in (
        ("3_classify", ["Task: classify", "autumn"]),
        ("5_respond", ["autumn"]),
        ("6_score", ["judge", "tea"]),
    ):
        out = tmp_path / step
        faults = lambda n, m: busy(words)(n, m) if step != "5_respond" or m[0]["role"] == "user" else None
        with serve(fake_teacher, faults) as server:
            argv = [*flags(tmp_path, server, small, step), "--retries", 1]
            assert run(*argv) == 0
        first = contents(out)
        assert first != calm and "report.md; the same command asks 1 of them again" in capfd.readouterr().out

        # the server is gone: the files stay, and a flag of a later step still applies
        assert run(*argv, "--margin", 0.2) == 0
        printed = capfd.readouterr()
        assert f"warning: {step}: requests without an answer are not asked again: the teacher at http" in printed.err
        assert "report.md; the same command asks 1 of them again" in printed.out
        assert contents(out) == first

        with serve(fake_teacher) as server:
            argv = flags(tmp_path, server, small, step)
            assert run(*argv) == 0
            assert contents(out) == calm and "no answer" not in capfd.readouterr().out
            assert any(all(word in json.dumps(m) for word in words) for m in server.seen)
            posts = server.posts
            assert run(*argv) == 0 and server.posts == posts


def test_refused_requests_and_edited_steps_are_not_asked_again(tmp_path, small, capfd):
    for status, says in (400, "report.md\n"), (500, "report.md; the same command asks 1 of them again\n"):
        with serve(fake_teacher, lambda n, m, status=status: status if "autumn" in str(m) else None) as server:
            argv = [*flags(tmp_path, server, small, str(status)), "--retries", 0]
            assert run(*argv) == 0
            assert re.search(rf"^1 request got no answer, see .*/{says}", capfd.readouterr().out, re.M)
            posts = server.posts
            assert run(*argv) == 0
            assert server.posts == posts + (2 if status == 500 else 0), "a try and a greeting"
    path = tmp_path / "500/3_classify.jsonl"
    edited = path.read_text().replace('"poem"', '"ode"')
    path.write_text(edited)
    with serve(fake_teacher) as server:
        assert run(*flags(tmp_path, server, small, "500"), "--retries", 0) == 0 and path.read_text() == edited
    assert "was edited since its step ran and is kept" in capfd.readouterr().out


def test_code_runs_only_when_allowed(tmp_path, small):
    source = tmp_path / "code.jsonl"
    reference = {"kind": "code", "value": {"tests": "assert f(2) == 3", "entry_point": "f"}}
    source.write_text(
        json.dumps(
            {"prompt": "Write f, the successor.", "completion": "def f(x):\n    return x", "reference": reference}
        )
    )

    def teach(messages):
        return (
            fake_teacher(messages)
            if messages[0]["content"].startswith("Task")
            else "```python\ndef f(x):\n    return x + 1\n```"
        )

    with serve(teach) as server:
        argv = [
            "--sources",
            source,
            "--trust-references",
            source,
            "--teacher",
            server.url,
            "--small",
            small,
            "--out",
            tmp_path / "out",
            "--min-category",
            1,
        ]
        assert run(*argv) == 0
        [record] = read(tmp_path / "out" / "6_score.jsonl")
        assert {r["verified"] for r in record["responses"].values()} == {None}
        assert run(*argv, "--allow-code-execution") == 0
        [record] = read(tmp_path / "out" / "6_score.jsonl")
        assert {w: r["verified"] for w, r in record["responses"].items()} == {
            "original": False,
            "teacher": True,
            "small": False,
        }
    assert [(line["writer"], line["label"]) for line in read(tmp_path / "out" / "kto.jsonl")][0] == ("teacher", True)


def test_programs_that_cannot_be_checked_are_counted(tmp_path, small):
    """The comparison would be the program's own, so it is neither right nor wrong."""
    source = tmp_path / "code.jsonl"
    reference = {"kind": "code", "value": {"tests": "assert f(2) == 3", "entry_point": "f"}}
    right = "def f(x):\n    return x + 1"
    source.write_text(json.dumps({"prompt": "Write f.", "completion": right, "reference": reference}))
    flatters = "class V:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return V()"

    def teach(messages):
        return fake_teacher(messages) if messages[0]["content"].startswith("Task") else flatters

    with serve(teach) as server:
        argv = ["--sources", source, "--trust-references", source, "--teacher", server.url, "--small", small]
        assert run(*argv, "--out", tmp_path / "out", "--min-category", 1, "--allow-code-execution") == 0
    counts = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]["6_score"]["verification"]
    assert counts == {
        "original": {"checked": 1, "right": 1, "unchecked": 0},
        "teacher": {"checked": 0, "right": 0, "unchecked": 1},
        "small": {"checked": 1, "right": 0, "unchecked": 0},
    }
    rows = [
        line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if line.startswith("| teacher |")
    ]
    assert rows == ["| teacher | 0 | 0 | 0 | 0 |  | 1 |"]


def test_a_file_under_two_names_is_one_source_and_no_output_is_a_source(tmp_path, small, capfd):
    source, out = tmp_path / "source.jsonl", tmp_path / "out"
    rows = [
        {"prompt": f"Name {i} things about {word}", "completion": "a"} for i, word in enumerate(("tea", "rain", "ink"))
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "link.jsonl").symlink_to(source)
    names = [source, f"{tmp_path}/./source.jsonl", tmp_path / "link.jsonl"]
    models = ["--small", small, "--teacher", small, "--out", out]
    assert run("--sources", *names, *models, "--dry-run") == 0
    assert [(r["id"], r["source"]) for r in read(out / "1_collect.jsonl")] == [
        (f"{tmp_path.name}/source.jsonl:{i}", f"{tmp_path.name}/source.jsonl") for i in (1, 2, 3)
    ]
    (out / "sft.jsonl").write_text(source.read_text())
    for flag in ("--sources", "--recorded", "--decontaminate"):
        more = [] if flag == "--sources" else ["--sources", source]
        assert run(flag, f"{out}/../out/sft.jsonl", *more, *models) == 2
        assert f"error: {flag} {out}/../out/sft.jsonl: this run would replace" in capfd.readouterr().err


def test_limit_takes_the_first_of_each_source(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"{name}{i}"}) + "\n" for i in range(9)))
    args, counts = type("Args", (), {"limit": 2, "max_chars": 99, "trust_references": []}), {}
    lines = list(steps.collect_sources(args, [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], counts))
    assert [r["prompt"][0]["content"] for _, r in lines] == ["a0", "a1", "b0", "b1"] and set(
        counts["by source"].values()
    ) == {2}


def test_a_local_teacher(tmp_path, small):
    """One checkpoint as teacher and as small model: its "7" parses as no category, so everything is set aside, and said so."""
    source, _ = world(tmp_path)
    out = tmp_path / "out"
    assert (
        run(
            "--sources", source, "--teacher", small, "--small", small, "--out", out, "--limit", 3, "--max-new-tokens", 4
        )
        == 2
    )
    assert [r["reason"] for r in read(out / "3_classify.dropped.jsonl")] == [
        "the teacher's reply did not parse, twice"
    ] * 3


def test_local_models_are_on_the_device_of_the_flag(tmp_path, small, monkeypatch):
    argv = ["make_data.py", "--sources", "f", "--teacher", small, "--small", small, "--perplexity", small]
    monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu", "--out", str(tmp_path / "out")])
    args = make_data.parse_args()
    assert (args.device, args.dtype) == ("cpu", None)
    args.device, args.dtype = "cuda:1", "bf16"
    models, placed = make_data.open_models(args), []
    monkeypatch.setattr(
        Qwen2, "from_pretrained", lambda *arguments: placed.append(arguments[1:]) or Qwen2(tiny_config())
    )
    for model in models:
        load(model)
    assert placed == [(torch.bfloat16, "cuda:1")] * 3


@pytest.fixture
def gone():
    with closed_port() as url:
        yield url


def short_pauses():
    workers.BACKOFF = 0.01


def test_bad_input_ends_with_one_line(tmp_path, small, gone):
    source, _ = world(tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q", \n')
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("")
    there = small  # a checkpoint answers too
    base = ["--small", small, "--out", tmp_path / "out", "--teacher"]
    cases = {
        "unreachable": (["--sources", source, *base, gone], gone),
        "malformed": (["--sources", broken, *base, there], f"{broken}:2: not JSON"),
        "empty": (["--sources", nothing, *base, there], "no record is left"),
        "missing": (["--sources", tmp_path / "no.jsonl", *base, gone], "no such file"),
        "no checkpoint": (["--sources", source, *base, tmp_path], str(tmp_path)),
        "small over http": (
            ["--sources", source, "--small", gone, "--teacher", gone, "--out", tmp_path / "out"],
            "local checkpoint",
        ),
        "flag": (["--sources", source, *base, gone, "--hamming", "40"], "--hamming: 40 is more than 16"),
        "device": (["--sources", source, *base, gone, "--device", "gpu"], "--device: 'gpu' is not supported"),
        "weights": (["--sources", source, *base, gone, "--weight-quality", "-1"], "-1 is less than 0"),
    }
    for name, (argv, what) in cases.items():
        if name not in ("unreachable", "malformed"):  # a process each only where the way out is what is tested
            with pytest.MonkeyPatch.context() as patch:
                lines = []
                patch.setattr("builtins.print", lambda *a, **k: lines.append(" ".join(map(str, a))))
                assert run(*argv) == 2, name
            stderr = "\n".join(line for line in lines if line.startswith("error:"))
        else:
            (code,), (text,) = launch("make_data", argv, tmp_path / "text", prepare={0: (short_pauses,)})
            assert code == 2, (name, text)
            stderr = text.strip()
        assert stderr.startswith("error: ") and what in stderr and len(stderr.splitlines()) == 1, (name, stderr)
        if name == "unreachable":
            assert not (tmp_path / "out").exists(), "it is known before the work begins, and nothing is left of the run"
    left = sorted(os.listdir(tmp_path / "out"))
    assert not [f for f in left if ".tmp" in f] and "3_classify.jsonl" not in left


def test_a_run_without_an_example_ends_with_one_line(tmp_path, small, capfd):
    """No record has an original response. Another choice of writers continues from the kept replies."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Compose some verse on {x}, please"}) + "\n" for x in ("tea", "rain"))
    )
    with serve(fake_teacher) as server:
        argv = ["--sources", path, "--teacher", server.url, "--teacher-model", "fake", "--small", small]
        argv += ["--min-category", 1, "--max-new-tokens", 8, "--out", tmp_path / "out"]
        assert run(*argv, "--writers", "original") == 2
        said, posts = capfd.readouterr(), server.posts
        fault = "sft.jsonl: no instruction gave an example; "
        assert (
            said.err.count("error: ") == 1 and f"error: {tmp_path}/out/{fault}" in said.err and "next:" not in said.out
        )
        assert "| no response of the chosen writers | 2 |" in (tmp_path / "out/report.md").read_text()
        assert run(*argv, "--writers", "small", "teacher") == 0 and server.posts == posts
    assert [r["writer"] for r in read(tmp_path / "out/sft.jsonl")] == ["teacher"] * 2


def test_a_judge_that_failed_is_asked_again_by_the_same_command(tmp_path, small, capfd):
    judging = lambda messages: messages[0]["content"].startswith("Task: judge")
    with serve(fake_teacher, lambda n, messages: 400 if judging(messages) else None) as server:
        argv = flags(tmp_path, server, small)
        assert run(*argv) == 2
        assert "6_score.jsonl: no record is left" in capfd.readouterr().err
    with serve(fake_teacher) as server:
        assert run(*flags(tmp_path, server, small)) == 0
        assert server.seen and all(map(judging, server.seen))
