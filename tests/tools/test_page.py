"""tools.page on the files of a small run: what it shows, what it escapes, and its lists and pager in a real browser."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import write_lines

from tools import svg
from tools.page import MAX_BYTES, page_html
from tools.run_files import read_runs

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
).split()


def cell(score, difference=None, p=None):
    versus = {"difference": difference, "interval": [difference - 0.1, difference + 0.1], "p_holm": p} if p else None
    return {"score": score, "stderr": 0.02, "n": 4, "protocol": "paper"} | ({"vs_first": versus} if versus else {})


@pytest.fixture
def run_dir(tmp_path):
    out = tmp_path / "demo"
    for name in ("eval", "data", "sft.run", "kto.run", "mean"):
        (out / name).mkdir(parents=True)
    results = {
        "base": {"demo": cell(0.25)},
        "sft": {"demo": cell(0.75, 0.5, 0.001)},
        "kto": {"demo": cell(0.3, 0.05, 0.7)},
    }
    (out / "eval/results.json").write_text(json.dumps(results))
    replies = {"base": ["4", "5", HOSTILE, "no"], "sft": ["4", "6", "7", "no"], "kto": ["4", "5", "7", "yes"]}
    right = ["4", "6", "7", "yes"]
    samples = [
        {
            "checkpoint": name,
            "task": "demo",
            "id": i,
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "reply": text,
            "extracted": text[:20],
            "correct": text == right[i],
        }
        for name, texts in replies.items()
        for i, text in enumerate(texts)
    ]
    write_lines(out / "eval/samples.jsonl", samples)
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"prompt {i // 2}"}],
            "label": i % 2 == 0,
            "writer": "teacher",
            "completion": [{"role": "assistant", "content": f"reply {i}"}],
            "scores": {"verified": i % 2 == 0},
        }
        for i in range(60)
    ]
    write_lines(out / "data/kto.jsonl", pairs)
    steps = {
        "1_collect": {"in": 100, "out": 90, "dropped": {"an empty turn": 10}},
        "4_balance": {
            "in": 90,
            "out": 60,
            "dropped": {},
            "before": {"a/b": 50, "c/d": 40},
            "after": {"a/b": 30, "c/d": 30},
        },
        "6_score": {"in": 60, "out": 60, "verification": {"teacher": {"checked": 10, "right": 9}}},
        "7_label": {"sft": 60, "kto": 60, "best": {"teacher": 40, "small": 20}, "worst": {"small": 30}},
    }
    (out / "data/report.json").write_text(json.dumps({"steps": steps}))
    log = [
        {"step": i, "loss": 1 / i, "lr": 1e-3, "grad_norm": 2.0, "tokens": 10, "tokens_per_second": 5.0}
        for i in range(1, 9)
    ]
    write_lines(out / "sft.run/log.jsonl", log)
    (out / "kto.run/log.jsonl").write_text(
        json.dumps(log[0] | {"kl": 0.1}) + '\n{"step": 2, "lo'
    )  # still being written
    args = {"command": ["train_sft.py", "--out", "my out"], "seed": 7, "torch": "2.13.0", "the data": "abcdef" * 10}
    (out / "sft.run/args.json").write_text(json.dumps(args))
    (out / "mean/merge.json").write_text(json.dumps({"method": "linear", "models": [{"source": "sft", "weight": 0.5}]}))
    points = [{"weights": [1 - w, w], "score": w, "stderr": 0.01} for w in (0.1, 0.5, 0.9)]
    search = {
        "points": points,
        "final": points[:1],
        "best": points[2],
        "models": ["a", "b"],
        "method": "linear",
        "what": "score",
    }
    (out / "search.json").write_text(json.dumps(search))
    return out


def test_every_section_is_there_and_counts_are_right(run_dir, run):
    code, said, err = run("tools.page", run_dir)
    page = (run_dir / "page.html").read_text(encoding="utf-8")
    assert code == 0 and str(run_dir / "page.html") in said and len(page) < MAX_BYTES, err
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Result",
        "Data",
        "Training",
        "Replies",
        "Fusion",
        "How to repeat it",
    ]
    assert "Significant against base (p &lt; 0.05): sft. Not significant: kto." in page
    assert "10 an empty turn" in page and "9 of 10" in page and "&#x27;my out&#x27;" in page
    pairs = json.loads(re.search(r'id="pairs">(.*?)</script>', page)[1])
    assert len(pairs) == 20 and all(int(p["desirable"]["reply"].split()[1]) % 2 == 0 for p in pairs)
    questions = json.loads(re.search(r'id="replies">(.*?)</script>', page)[1])
    assert [q["id"] for q in questions] == [1, 2, 3]  # on question 0 all are right


def test_text_from_data_is_text(run_dir):
    page = page_html(read_runs([str(run_dir)], 0), "<b>title</b>")
    assert HOSTILE not in page and "<b>title" not in page and "<img src=x" not in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "http://" not in page and "https://" not in page


def test_several_runs_share_a_page_and_a_run_without_files_is_refused(run_dir, tmp_path, refused):
    other = tmp_path / "second"
    shutil.copytree(run_dir, other)
    found = read_runs([str(run_dir), str(other)], 0)
    assert {"demo/base", "second/base"} <= set(found.results) and {"demo/sft", "second/sft"} <= set(found.logs)
    (tmp_path / "empty").mkdir()
    refused("nothing to show", "tools.page", tmp_path / "empty")
    refused("no such folder", "tools.page", tmp_path / "missing")


def test_a_part_of_a_run_makes_a_page(tmp_path, run):
    (tmp_path / "sft.run").mkdir()
    (tmp_path / "sft.run/log.jsonl").write_text('{"step": 1, "loss": 0.5, "lr": 0.0, "grad_norm": null, "tokens": 1}\n')
    assert run("tools.page", tmp_path)[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Training", "How to repeat it"]


def test_ticks_are_round_and_inside():
    assert svg.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert svg.ticks(-3, 148) == [0, 50, 100] and svg.ticks(2, 2) == [2]
    assert svg.label(15000) == "15k" and svg.label(0.25) == "0.25"


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_lists_and_pager_work_in_a_browser(run_dir, tmp_path):
    """The page runs without an error in its console; a script does what a reader would and writes down what it sees."""
    page = page_html(read_runs([str(run_dir)], 0), "demo").replace(
        "script-src 'unsafe-inline'", "script-src 'unsafe-inline'"
    )
    clicks = """<script>
      const seen = [], note = (selector) => seen.push(document.querySelector(selector).textContent);
      note("#pager .count"); document.querySelector("#pager .next").click(); note("#pager .count");
      note("#replies-view .count");
      document.getElementById("second").value = "kto"; document.getElementById("second").dispatchEvent(new Event("change"));
      note("#replies-view .count"); note("#replies-view .item");
      document.getElementById("who").value = "first"; document.getElementById("who").dispatchEvent(new Event("change"));
      note("#replies-view .count");
      document.querySelectorAll("th.sort")[1].click();
      seen.push(document.querySelector("tbody tr").cells[0].textContent);
      document.body.setAttribute("data-seen", JSON.stringify(seen));
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", clicks), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(
        re.search(r'data-seen="(.*?)"', done.stdout)[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">")
    )
    assert seen[:4] == ["1 of 20", "2 of 20", "1 of 2", "1 of 2"], seen
    assert HOSTILE in seen[4] and seen[5] == "none" and seen[6] == "sft"
    assert "<title>demo</title>" in done.stdout
