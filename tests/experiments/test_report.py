"""experiments.report: the committed report follows from the committed results; figures of a small result by hand."""

import copy
import json
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT

from experiments import tables
from experiments.pictures import running_mean
from experiments.repeat import step_module, study_command
from experiments.report import read_results, report
from experiments.seeds_section import compare_seeds, loss_rates_table, seeds_of, seeds_table, seeds_text
from experiments.tables import TableRow, compare, interval, measured_text, points, verdict

RESULTS = sorted((ROOT / "experiments" / "results").glob("*.json"))


@pytest.mark.skipif(not RESULTS, reason="no result file is committed yet")
def test_the_committed_report_follows_from_the_committed_results():
    text, drawn = report(read_results([str(path) for path in RESULTS]), "images")
    assert (ROOT / "docs/REPORT.md").read_text(encoding="utf-8") == text
    for name, picture in drawn.items():
        assert (ROOT / "docs/images" / name).read_text(encoding="utf-8") == picture
    assert sorted(p.name for p in (ROOT / "docs/images").glob("report-*.svg")) == sorted(drawn)


def test_the_sections_that_the_help_texts_name():
    headings = (ROOT / "docs/REPORT.md").read_text(encoding="utf-8")
    assert "\n## 7. The paper's table with another student" in headings  # run.sh
    assert "\n## 8. General instructions" in headings  # run.sh, curation/flags.py


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_scores_of_the_readme_are_those_of_the_results(path):
    result = json.loads(path.read_text())
    verdicts, cells = tables.split_verdicts(result, "test"), []
    for arm in ("base", "sft", "kto", "sft-kto", "mean", "mean-05-95", "ties"):
        shares = [100 * sum(right) / len(right) for right in seeds_of(arm, verdicts).values()]
        assert arm == "base" or len(shares) == {"Qwen2.5-Coder-0.5B-Instruct": 1, "SmolLM2-135M-Instruct": 3}[path.stem]
        cells.append(f"{sum(shares) / len(shares):.1f}")
    assert f"| {result['student']} | {' | '.join(cells)} |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not RESULTS, reason="no result file is committed yet")
def test_the_sentences_of_the_readme_are_those_of_the_results():
    large, small = (read_results([str(ROOT / f"experiments/results/{name}.json")])[0] for name in (
        "Qwen2.5-Coder-0.5B-Instruct", "SmolLM2-135M-Instruct"))  # fmt: skip
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    scores = lambda split, *arms: [
        f"{100 * right.count('1') / len(right):.1f}"
        for right in (tables.split_verdicts(large, split, split)[arm] for arm in arms)
    ]
    methods = ("sft", "kto", "sft-kto")
    original = scores("gsm8k", "base", *(f"general-{method}" for method in methods))
    own = scores("gsm8k", *(f"general-own-{method}" for method in methods))
    kept = tables.kept_verdicts(large)
    share = lambda task, arm: 100 * kept[task][arm].count("1") / len(kept[task][arm])
    assert (
        "C-Eval of the 0.5B is {:.1f} before, {:.1f} after SFT, {:.1f} after KTO and {:.1f} after both".format(
            *(share("C-Eval", arm) for arm in ("base", *methods))
        )
        in text
    )
    p = [found["p_holm"] for found in tables.compare(tables.kept_rows("C-Eval"), kept["C-Eval"]).values()]
    assert "p is {}, {} and {}.".format(*map(tables.p_text, p[:3])) in text
    assert max(abs(share("MMLU", arm) - share("MMLU", "base")) for arm in tables.KEPT) == pytest.approx(1.2)
    perplexity = [f"{large['values'][arm]['perplexity']['score']:.0f}" for arm in ("base", *methods)]
    assert "perplexity of plain text goes from {} to {}, {} and {}.".format(*perplexity) in text
    ifeval = scores("ifeval", "base", *methods)
    assert "the 0.5B goes from {} % to {} (SFT), {} (KTO) and {} (both)".format(*ifeval) in text
    rates = [
        f"{right.count('1') / 5:.1f}"
        for right in (tables.split_verdicts(large, "test")[arm] for arm in ("sft-kto-paper-lr", "sft-kto"))
    ]
    assert f"the 0.5B reaches {rates[0]} % in place of {rates[1]}." in text
    assert "GSM8K of the 0.5B falls from {} % to {} (SFT), {} (KTO) and {} (both)".format(*original) in text
    assert "the data sets' own responses it is {}, {} and {}.".format(*own) in text
    cut = [f"{large['arms'][arm]['test']['ifeval']['cut_off'] / 5:.0f} %" for arm in ("base", "sft-kto")]  # of 500
    assert f"cuts off {cut[0]} of the 0.5B's before training, {cut[1]} after SFT and KTO" in text
    figures = "own responses SFT {}, KTO {}, SFT-KTO {}; with the models' right replies {}, {}, {} |"
    assert figures.format(*original[1:], *own) in (ROOT / "docs/results.md").read_text(encoding="utf-8")
    n = sum(large[name]["instructions"] for name in ("data", "general_data"))
    assert f"code among {n:,} instructions" in text
    test = {arm: right.count("1") / 5 for arm, right in tables.split_verdicts(small, "test").items()}  # % of 500
    assert f"teacher cost SFT {test['sft'] - test['sft-teacher']:.0f} points" in text
    assert f"30 % wrong labels cost KTO {test['kto'] - test['kto-noise-30']:.0f}." in text


@pytest.mark.skipif(not RESULTS, reason="no result file is committed yet")
def test_the_sentences_on_losses_are_those_of_the_results():
    (small,) = read_results([str(ROOT / "experiments/results/SmolLM2-135M-Instruct.json")])
    verdicts = tables.split_verdicts(small, "test")
    found = {row.arm: compare_seeds(row, verdicts) for row in tables.LOSSES if row.baseline}
    found = {arm: some for arm, some in found.items() if some}
    assert {arm: list(by_seed) for arm, (by_seed, _) in found.items()} == dict.fromkeys(tables.LOSS_NAMES, [0, 1, 2])
    at = {arm: tables.points(all_seeds["difference"]) for arm, (_, all_seeds) in found.items()}
    assert at == {"dft": "-4.0", "asft": "-7.0", "otr": "-3.9", "poft": "+0.9", "sft-dpo": "+1.5"}
    excludes_0 = [arm for arm, (_, some) in found.items() if some["interval"][0] > 0 or some["interval"][1] < 0]
    assert excludes_0 == ["asft"]
    read = lambda name: " ".join((ROOT / name).read_text(encoding="utf-8").split())
    words = "ASFT scores 7.0 points below SFT, DFT 4.0 and OTR 3.9 below, PoFT 0.9 above. DPO after SFT scores 1.5 points above KTO"
    assert words in read("variants/README.md")
    assert "ASFT 7.0 points below SFT, DFT 4.0, OTR 3.9, PoFT 0.9 above; DPO 1.5 above KTO" in read("docs/results.md")


BASE = "1" * 4 + "0" * 16  # 20 %
SFT = "1" * 12 + "0" * 8  # 60 %: 8 gained, none lost
KTO = "0" + "1" * 5 + "0" * 14  # 25 %: 2 gained, 1 lost


def replies(right):
    return {"ifeval": {"right": right, "reply_tokens": [10, 30] * (len(right) // 2), "cut_off": 5, "looping": 1}}


@pytest.fixture
def result():
    train = ["--epochs", "2", "--batch-size", "8", "--seed", "3", "--dtype", "bf16"]
    return {
        "student": "small",
        "teacher": "large",
        "commands": {
            "data": ["make_data.py", "--small", "ckpt/s", "--max-new-tokens", "100"],
            "teacher": ["eval.py", "--ckpt", "ckpt/t"],
            "sft-1e-5": ["train_sft.py", "--lr", "1e-5", *train],
            "kto-2e-6": ["train_kto.py", "--beta", "0.1", *train],
            "eval-test-base": ["eval.py", "--ckpt", "ckpt/s", "--max-new-tokens", "160"],
        },
        "seconds": {"data": 120.0, "sft-1e-5": 90.0, "kto-2e-6": 30.0},
        "chosen": {
            "sft": {"lr": "1e-5", "dev": {"1e-5": 0.25, "5e-5": 0.2}},
            "kto": {"lr": "2e-6", "dev": {"2e-6": 0.3}},
        },
        "data": {
            "instructions": 9,
            "sft": 6,
            "kto": 8,
            "kto_desirable": 4,
            "steps": {"1_collect": [10, 10]},
            "followed": {"teacher": [8, 10], "small": [1, 4], "small-2": [1, 2]},
        },
        "arms": {"base": {"test": replies(BASE)}, "sft": {"test": replies(SFT)}, "kto": {"test": replies(KTO)}},
        "values": {"base": {"mmlu": {"score": 0.25, "stderr": 0.1, "n": 20, "right": BASE, "ece": 0.125}}},
        "curves": {
            "kto": {key: [0.0, 1.0, 2.0] for key in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins")}
        },
    }


@pytest.fixture
def save(tmp_path):
    def write(result, name="r.json"):
        path = tmp_path / name
        path.write_text(json.dumps(result))
        return str(path)

    return write


ROWS = [
    TableRow("base"),
    TableRow("sft", "base", "SFT helps"),
    TableRow("kto", "base", "KTO hurts", better=False),
    TableRow("ties", "sft"),
]


def test_paired_differences_by_hand():
    found = compare(ROWS, {"base": BASE, "sft": SFT, "kto": KTO})
    assert list(found) == ROWS[1:3]  # no comparison for the base, none without verdicts
    sft, kto = found.values()
    assert sft["difference"] == pytest.approx(8 / 20) and kto["difference"] == pytest.approx(1 / 20)
    assert sft["p"] == pytest.approx(2 / 2**8)  # McNemar: all 8 differing questions on one side
    assert kto["p"] == 1  # 2 against 1: 2 (1 + 3) / 8
    assert sft["p_holm"] == pytest.approx(2 * 2 / 2**8) and kto["p_holm"] == 1
    # differences of SFT: 8 times 1, 12 times 0, so s^2 = (8 * 0.6^2 + 12 * 0.4^2) / 19 = 4.8 / 19
    assert sft["smallest"] == pytest.approx((1.96 + 0.8416) * (4.8 / 19 / 20) ** 0.5)
    assert verdict(ROWS[1], sft) == "held" and verdict(ROWS[2], kto) == "undecided"
    assert verdict(ROWS[1]._replace(better=False), sft) == "opposite"


def test_other_seeds_by_hand():
    verdicts = {
        "base": BASE,
        "sft": SFT,
        "sft-seed-2": "1" * 8 + "0" * 12,
        "sft-seed-1": "1" * 4 + "0" * 16,
        "kto": KTO,
    }
    by_seed, all_seeds = compare_seeds(ROWS[1], verdicts)
    assert by_seed == pytest.approx({0: 8 / 20, 1: 0, 2: 4 / 20})  # the base is one for all seeds
    assert all_seeds["difference"] == pytest.approx(4 / 20)
    assert compare_seeds(ROWS[2], verdicts) is None and seeds_text(ROWS[2], verdicts) == ""
    assert seeds_text(ROWS[1], verdicts) == "; seeds 0, 1, 2: +40.0, +0.0, +20.0"
    row = TableRow("sft-kto", "sft")  # seeds that only one of the two has do not count
    both = {**verdicts, "sft-kto": SFT, "sft-kto-seed-2": SFT, "sft-kto-seed-7": SFT}
    assert compare_seeds(row, both)[0] == pytest.approx({0: 0, 2: 4 / 20})
    lines = seeds_table(ROWS, verdicts).splitlines()
    assert any(
        line.startswith(f"| {tables.NAMES['sft']} | 60.0 | 20.0 | 40.0 | 40.0 | {tables.NAMES['base']} | +20.0 [")
        for line in lines
    )
    assert seeds_table(ROWS, {"base": BASE, "sft": SFT}) == ""


def test_loss_rates_by_hand():
    dev = {arm: {"dev": replies(right)} for arm, right in (("dft", BASE), ("dft-half", KTO), ("poft", SFT))}
    text = loss_rates_table({"arms": dev})
    assert "| DFT | **25.0** | 20.0 |  |" in text and "| PoFT |  | **60.0** |  |" in text and "OTR" not in text
    assert loss_rates_table({"arms": {}}) == ""


def test_section_numbers_of_several_students():
    plain = {"general_data": {}, "arms": {}, "values": {}}
    general = {"general_data": {"sft": 1}, "arms": {"general-sft": {"test": replies(SFT)}}, "values": {}}
    assert tables.section_numbers([general, plain, general]) == [(7, 8), (9, 0), (10, 11)]


def test_equal_arms_can_show_six_questions():
    (found,) = compare([TableRow("sft", "base", "SFT helps")], {"base": BASE, "sft": BASE}).values()
    assert found["smallest"] == 6 / 20 and found["p_holm"] == 1 and found["difference"] == 0
    assert 2 / 2**tables.FEWEST < 0.05 < 2 / 2 ** (tables.FEWEST - 1)


def test_sentences_and_numbers():
    (row, held), (other, _) = list(compare(ROWS, {"base": BASE, "sft": SFT, "kto": KTO}).items())
    exact = {**held, "interval": (0.2, 0.6)}
    assert measured_text(row, exact) == "+40.0 points [+20.0, +60.0], p = 0.016"
    assert measured_text(row, {**exact, "p_holm": 0.0001}) == "+40.0 points [+20.0, +60.0], p < 0.001"
    unknown = {**exact, "difference": -0.0001, "interval": (-0.1, 0.1), "p_holm": 0.7, "smallest": 0.314}
    assert measured_text(other, unknown) == "+0.0 points [-10.0, +10.0], p = 0.70; 20 questions can detect 31.4 points"
    assert points(-0.0004) == "+0.0" and points(-0.0006) == "-0.1"
    # 4 of 20: standard error sqrt(0.2 * 0.8 / 19)
    half = 196 * (0.16 / 19) ** 0.5
    assert interval(BASE) == pytest.approx((20 - half, 20, 20 + half))
    assert interval("1111") == (100, 100, 100) and interval("0001")[0] == 0


def test_the_report_of_a_small_result(result, save):
    text, drawn = report(read_results([save(result)]), "pictures")
    opposite, held, undecided = (text.index(f"### {word}") for word in ("Contradicted", "Confirmed", "Undecided"))
    assert opposite < held < undecided
    assert "SFT on the best verified reply improves the student: +40.0 points" in text[held:undecided]
    assert "KTO alone improves the student: +5.0 points" in text[undecided : text.index("## Method")]
    assert "| SFT on original responses |  |  |  |  | not run: the instructions are made by a program" in text
    assert "| SFT, then KTO |  |  |  |  | not run |" in text
    assert "| student before training | 20.0 [2.0, 38.0] |  |  |  |  |" in text
    assert "| SFT | 1e-5 | 25.0 | chosen |" in text and "| SFT | 5e-5 | 20.0 |  |" in text
    assert "| KTO | 2e-6 | 30.0 | the only one tried |" in text
    assert (
        "10 training instructions, 9 of them with a complete response" in text and "8 KTO examples, 4 of them" in text
    )
    assert "| KTO | 20.0 [" in text[text.index("Replies to the test instructions") :]  # mean of 10 and 30 tokens
    assert "25.0 | 5.0 |" in text  # cut off 5 of 20, looping 1 of 20
    assert sorted(drawn) == [
        "report-followed.svg",
        "report-kto.svg",
        "report-scores.svg",
    ]  # one point is no fusion curve
    assert all(f"](pictures/{name})" in text for name in drawn)
    for picture in drawn.values():
        ElementTree.fromstring(picture)


def test_benchmarks_that_no_arm_was_trained_for(result, save):
    result["values"]["sft"] = {"ceval": {"score": 0.6, "stderr": 0.1, "n": 20, "right": SFT, "ece": 0.5}}
    result["values"]["base"]["ceval"] = {"score": 0.2, "stderr": 0.1, "n": 20, "right": BASE, "ece": 0.5}
    for arm, right in (("base", SFT), ("kto", BASE)):
        cell = {"right": right, "reply_tokens": [1] * 20, "cut_off": 0, "looping": 0}
        result["arms"][arm]["gsm8k"] = {"gsm8k": cell}
    text, _ = report(read_results([save(result)]), "x")
    table = text[text.index("6. Side effects") : text.index("Replies to the test instructions")]
    assert "| MMLU | 20 | 20.0 [2.0, 38.0] | not run | not run | not run | not run |" in table
    assert "| C-Eval | 20 | 20.0 [2.0, 38.0] | 60.0 (+40.0 [+20.0, +60.0], p = 0.008) | not run |" in table  # 2 / 2^8
    assert "| GSM8K | 20 | 60.0 [38.0, 82.0] | not run | 20.0 (-40.0 [-60.0, -20.0], p = 0.008) | not run |" in table
    assert "HumanEval" not in table and "| KTO | not run | not run |" in table
    assert "`merge.py search` chose" not in text
    result["commands"]["searched"] = ["merge.py", "--models", "runs/study/sft:0.25", "runs/study/sft-kto:0.75"]
    assert "`merge.py search` chose 0.25 SFT + 0.75 SFT-KTO." in report(read_results([save(result)]), "x")[0]
    held = text[text.index("### Confirmed") : text.index("### Undecided")]
    assert "- KTO lowers the score of GSM8K: -40.0 points" in held


def test_reasons_of_the_result_file_and_a_missing_baseline(result, save):
    del result["arms"]["base"]
    result["not_run"] = {"ties": "not run: no time", "sft-original": "not run: none"}
    text, _ = report(read_results([save(result)]), "x")
    assert (
        "| TIES of SFT and KTO |  |  |  |  | not run: no time |" in text
        and "original responses |  |  |  |  | not run: none |" in text
    )
    assert "|  |  |  | no result of: student before training |" in text


def test_a_result_without_any_arm_or_data(result, save):
    for key in ("commands", "seconds", "chosen", "data", "arms", "values", "curves"):
        result[key] = {}
    text, drawn = report(read_results([save(result)]), "x")
    assert "No data have been made yet" in text and not drawn
    assert text.count("- Nothing.") == 3


def test_files_are_joined(result, save):
    more = copy.deepcopy(result)
    more["arms"] = {"sft-kto": {"test": replies(KTO)}}
    (joined,) = read_results([save(result), save(more, "more.json")])
    assert sorted(joined["arms"]) == ["base", "kto", "sft", "sft-kto"]


def test_another_student_has_its_own_section(result, save):
    other = copy.deepcopy(result) | {"student": "larger", "trained_tokens": {"sft-1e-5": 4500}, "chosen": {}}
    del other["arms"]["kto"]
    other["seconds"]["eval-test-base"] = 50.0
    text, drawn = report(read_results([save(other, "a.json"), save(result)]), "x")
    section = text[text.index("The paper's table with another student: larger") : text.index("## How to repeat it")]
    assert "| KTO |  |  |  |  | not run |" in section and "| SFT | 1e-5 |  | the only one tried |" in section
    assert "report-scores-2.svg" in section and "report-scores-2.svg" in drawn
    assert "- SFT on the best verified reply improves the student: small +40.0 points" in text
    assert "p = 0.016. larger +40.0 points" in text  # 2 / 2^8, twice for the two claims about the first student
    assert "| larger | 20.0 [2.0, 38.0] | 60.0 [" in text
    # 20 replies of 20 tokens in 50 s; 4,500 tokens in 90 s
    assert "tokens to generate at 8 per\nsecond, 10.5 million to train on at 50 per second" in text


def test_another_student_has_the_studies_that_it_ran(result, save):
    other = copy.deepcopy(result) | {"student": "larger"}
    other["arms"] = {"base": {"test": replies(BASE)}, "sft": {"test": replies(SFT)}}
    other["arms"]["sft-kto-own"] = {"test": replies(KTO)}
    result["arms"] |= {arm: {"test": replies(KTO)} for arm in ("sft-kto", "mean")}  # the first student has most arms
    text, _ = report(read_results([save(result), save(other, "a.json")]), "x")
    section = text[text.index("The paper's table with another student: larger") : text.index("## How to repeat it")]
    assert "### KTO on the model's own responses" in section and "### The effect of verification" not in section
    row = "| SFT, then KTO on own responses | 25.0 [5.5, 44.5] | SFT on the best verified reply | -35.0 ["
    assert row in section


def test_general_instructions_have_a_table_for_each_benchmark(result, save):
    other = copy.deepcopy(result) | {"student": "larger", "general_data": copy.deepcopy(result["data"])}
    other["general_data"] |= {"instructions": 5, "sft_writers": {"original": 3, "small": 3}}
    other["arms"]["general-sft"] = {"test": replies(SFT), "gsm8k": {"gsm8k": replies(SFT)["ifeval"]}}
    other["arms"]["base"]["gsm8k"] = {"gsm8k": replies(BASE)["ifeval"]}
    other["commands"]["general-sft"] = ["train_sft.py", "--data", "a", "b"]
    other["seconds"]["general-sft"] = 120.0
    other["arms"]["sft-kto"] = {"test": replies(KTO)}  # more arms than the first student would make it the first
    result["arms"] |= {arm: {"test": replies(KTO)} for arm in ("sft-kto", "mean", "mean-05-95", "ties")}
    text, _ = report(read_results([save(result), save(other, "a.json")]), "x")
    section = text[text.index("## 8. General instructions: larger") : text.index("## How to repeat it")]
    assert "these are 14 instructions after all steps" in section  # 9 and 5
    assert "80 % of the teacher's and\n25 % of the student's" in section  # 8 of 10, 1 of 4
    assert "the best response of 3 instructions" in section
    assert "The test instructions:\n" in section and "GSM8K:\n" in section and "HumanEval:\n" not in section
    row = "| SFT on general instructions | 60.0 [38.0, 82.0] | student before training | +40.0 [+20.0, +60.0] | 0.008 |"
    assert section.count(row) == 2  # one comparison for each benchmark: 2 / 2^8
    assert (
        "| arm | test instructions | GSM8K |" in section
        and "| SFT on general instructions | 20 (25 %) | 20 (25 %) |" in section
    )
    assert "No run used 1,000" not in text
    held = text[text.index("### Confirmed") : text.index("### Undecided")]
    claim = "- SFT on general instructions improves the student: "
    both = "larger on the test instructions +40.0 points [+20.0, +60.0], p = 0.008. larger on GSM8K +40.0 points"
    assert claim + both in held
    assert "| larger | 8 | `python -m experiments.general --student ckpt/s" in text
    assert "General instructions" not in report(read_results([save(result)]), "x")[0]


def test_bad_result_files(result, save, refused, tmp_path):
    call = lambda words, *paths: refused(words, "experiments.report", "--results", *paths, "--out", tmp_path / "R.md")
    call("nothing.json", tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text('{"arms": ')
    call("broken.json", tmp_path / "broken.json")
    call("student", save({}))
    call("not an object", save({**result, "arms": []}))
    call("malformed", save({**result, "arms": {"base": [1]}}))
    call("'right'", save({**result, "arms": {"base": {"test": replies("12")}}}))
    shorter = {**result["arms"], "sft": {"test": replies(SFT[:-2])}}
    call(["sft has 18 verdicts", "base 20"], save({**result, "arms": shorter}))
    call("r.json: not as", save({**result, "chosen": {"sft": 1}}))
    call("r.json: not as", save({**result, "data": {"sft": 3}}))
    call("r.json: not as", save({**result, "curves": {"kto": {"kl": "x"}}}))
    assert not (tmp_path / "R.md").exists()


def test_the_command_line_writes_report_and_pictures(result, save, run, tmp_path):
    out = tmp_path / "docs"
    code, _, err = run("experiments.report", "--results", save(result), "--out", out / "R.md", "--images", out / "im")
    assert code == 0, err
    text, drawn = report(read_results([save(result)]), "im")
    assert (out / "R.md").read_text() == text
    assert {p.name: p.read_text() for p in (out / "im").iterdir()} == drawn


def test_every_step_belongs_to_one_study():
    expected = {
        "instructions": "data", "data": "data", "teacher": "data", "sft-1e-5": "paper_table", "kto-2e-6": "paper_table",
        "eval-dev-sft-1e-5": "paper_table", "eval-test-base": "paper_table", "mean-05-95": "paper_table", "sft-kto": "paper_table",
        "own-data": "own_responses", "sft-kto-own": "own_responses", "eval-test-sft-kto-own": "own_responses",
        "sft-teacher": "data_steps", "eval-test-sft-random": "data_steps", "kto-no-z0": "kto_parts",
        "eval-test-sft-desirable": "kto_parts", "dft": "related_losses", "mmlu-base": "side_effects", "ifeval-sft-kto": "side_effects",
        "general-data": "general", "general-sft": "general", "eval-test-general-kto": "general", "gsm8k-general-sft": "side_effects",
    }  # fmt: skip
    assert {step: step_module(step) for step in expected} == expected


def test_the_command_of_a_study_has_the_flags_that_are_no_defaults(result):
    words = study_command(result, "kto_parts")
    assert words == (
        "python -m experiments.kto_parts --student ckpt/s --kto-lrs 2e-6 --batch-size 8 --seed 3"
    )  # 1e-5 and 5e-5, two passes, beta 0.1 are the defaults
    assert study_command(result, "data").endswith("--teacher ckpt/t")


def test_running_mean():
    assert running_mean([0.0, 2.0, 4.0], size=2) == [(1, 0.0), (2, 1.0), (3, 3.0)]
