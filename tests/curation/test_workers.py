"""curation/workers.py against an endpoint that fails on request: retries, what is set aside, what ends a run, rates, budgets."""

import time

import pytest
from mock_endpoint import KEY, closed_port, echo, environment, serve, user  # noqa: F401  (environment is a fixture)

from core.files import InputError
from curation import workers
from curation.costs import price
from curation.teacher import ask_model, open_replies, open_teacher


def test_twenty_percent_faults_cost_only_time(tmp_path, monkeypatch):
    monkeypatch.setattr(
        workers, "FIRST_TRIES", 99
    )  # the first answers wait for 64 in flight, and their faults may come thrice
    kinds = ["drop", 500, (429, [("Retry-After", "0")]), "garbage", 503, 502, (503, [("Retry-After", "0.2")])]

    def faults(n, messages):
        return kinds[(n // 5) % len(kinds)] if n % 5 == 2 else None

    def held(messages):  # until 64 are in flight
        while server.peak < 64 and time.monotonic() < deadline:
            time.sleep(0.01)
        return echo(messages)

    deadline = time.monotonic() + 100
    with serve(held, faults) as server, open_replies(tmp_path / "r.jsonl") as log:
        prompts = [user(f"q{i}") for i in range(200)]
        replies = ask_model(open_teacher(server.url, "m"), prompts, log, concurrency=64, retries=99)
        assert server.peak == 64 and log.spent == [2000, 1000], "what was charged is what was answered"
        assert [r["text"] for r in replies] == [f"re: q{i}" for i in range(200)]
        assert len(server.seen) == 200, "every request was answered once and paid for once"
        assert server.posts > 230, "the faults did happen"


def test_retry_after_is_honoured(tmp_path):
    at = []

    def faults(n, messages):
        at.append(time.monotonic())
        return (429, [("Retry-After", "0.3")]) if n == 0 else None

    with serve(echo, faults) as server, open_replies(tmp_path / "r.jsonl") as log:
        ask_model(open_teacher(server.url, "m"), [user("q")], log)
    assert len(at) == 2 and at[1] - at[0] >= 0.3, "the backoff alone would have been 10 ms"


def test_a_reply_that_does_not_come_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "FIRST_TRIES", 99)  # on a slow machine the second may come too late as well
    with serve(echo, lambda n, m: "hang" if n == 0 else None) as server, open_replies(tmp_path / "r.jsonl") as log:
        replies = ask_model(open_teacher(server.url, "m"), [user("q")], log, timeout=1, retries=99)
        assert replies[0]["text"] == "re: q" and server.posts >= 2


def test_400_is_not_retried_and_401_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", KEY)

    def faults(n, messages):
        return 400 if messages[-1]["content"] == "bad" else None

    with serve(echo, faults) as server, open_replies(tmp_path / "r.jsonl") as log:
        replies = ask_model(open_teacher(server.url, "m"), [user("bad"), user("good")], log)
        assert replies[0]["error"].startswith("HTTP 400") and replies[1]["text"] == "re: good"
        assert server.posts == 2
        assert KEY not in replies[0]["error"], "a server that echoes the key does not get it into our files"
    with serve(echo, lambda n, m: 401) as server, open_replies(tmp_path / "r.jsonl") as log:
        with pytest.raises(InputError, match="HTTP 401.*TEACHER_API_KEY") as e:
            ask_model(open_teacher(server.url, "m"), [user("a")], log)
        assert server.posts == 1 and KEY not in str(e.value)


def test_every_request_refused_is_an_error(tmp_path):
    with serve(echo, lambda n, m: 400) as server, open_replies(tmp_path / "r.jsonl") as log:
        with pytest.raises(InputError, match="refused every request: HTTP 400"):
            ask_model(open_teacher(server.url, "m"), [user("a"), user("b")], log)


@pytest.mark.parametrize("fault", [500, 503, 403, "drop", "garbage"])
def test_a_request_that_always_fails_is_set_aside(tmp_path, fault):
    """It is told from an outage by a greeting that is answered, and asked again by the next run."""
    prompts = [user("poison"), *(user(f"q{i}") for i in range(30)), user("bad")]
    faults = {"poison": fault, "bad": 400}
    with serve(echo, lambda n, m: faults.get(m[-1]["content"])) as server, open_replies(tmp_path / "r.jsonl") as log:
        teacher = open_teacher(server.url, "m")
        replies = ask_model(teacher, prompts, log, concurrency=2, retries=3)
        assert [r["text"] for r in replies[1:-1]] == [f"re: {m[-1]['content']}" for m in prompts[1:-1]]
        why = "HTTP 403: no" if fault == 403 else "no answer after 4 tries (last: "
        assert replies[0]["error"].startswith(why) and replies[-1]["error"].startswith("HTTP 400")
        tries = 1 if fault == 403 else 4
        assert server.posts == tries + 30 + 1 + 1, "its tries, the others, a greeting, the refused one"
        assert len(log) == 30 and "\n" not in replies[0]["error"]
        del faults["poison"]
        replies = ask_model(teacher, prompts, log, concurrency=2, retries=3)
        assert [r["text"] for r in replies[:-1]] == [f"re: {m[-1]['content']}" for m in prompts[:-1]]
        assert replies[-1]["error"].startswith("HTTP 400") and server.posts == tries + 32 + 2, (
            "what is refused stays refused"
        )


def test_a_request_that_gets_429_is_tried_for_longer(tmp_path):
    """HTTP 429 says nothing against a request: it is tried for longer, but not for ever."""
    left = {"slow": 10, "too large": 10**9}

    def faults(n, messages):
        text = messages[-1]["content"]
        left[text] = left.get(text, 0) - 1
        return 429 if left[text] >= 0 else None

    with serve(echo, faults) as server, open_replies(tmp_path / "r.jsonl") as log:
        teacher = open_teacher(server.url, "m")
        slow, large = ask_model(teacher, [user("slow"), user("too large")], log, concurrency=1, retries=3)
        assert slow["text"] == "re: slow" and large["error"].startswith("no answer after 4 tries (last: HTTP 429")
        assert server.posts == (10 + 1 + 2) + (4 * 4 + 4), "tries, and a greeting after each round that failed"


def test_no_credit_ends_the_run_at_once(tmp_path):
    body = b'{"error": {"code": "insufficient_quota", "message": "You exceeded your current quota"}}'
    with serve(echo, lambda n, m: body) as server, open_replies(tmp_path / "r.jsonl") as log:
        with pytest.raises(InputError, match="You exceeded your current quota; the account has no credit"):
            ask_model(open_teacher(server.url, "m"), [user("q")], log)
        assert server.posts == 1


def test_an_outage_ends_the_run_and_loses_no_record(tmp_path):
    """From the eleventh reply on the endpoint fails: nothing is set aside, and the next run gets every reply."""
    prompts, down = [user(f"q{i}") for i in range(30)], True
    with (
        serve(echo, lambda n, m: 503 if down and len(server.seen) >= 10 else None) as server,
        open_replies(tmp_path / "r.jsonl") as log,
    ):
        teacher = open_teacher(server.url, "m")
        with pytest.raises(
            InputError, match=r": no answer after 4 tries \(last: HTTP 503.*is kept: run the same command"
        ) as e:
            ask_model(teacher, prompts, log, concurrency=4, retries=3)
        assert 10 <= len(log) <= 14 and "\n" not in str(e.value)
        down, asked = False, len(log)
        assert [r["text"] for r in ask_model(teacher, prompts, log, retries=3)] == [f"re: q{i}" for i in range(30)]
        assert len(server.seen) == 30 and asked < 30, "each was answered once"


@pytest.mark.parametrize(
    "fault", [b'{"choices": []}', 400, "garbage", 503, b'{"error": {"message": "no"}}', b"[" * 100_000]
)
@pytest.mark.parametrize("kept", [False, True])
def test_an_endpoint_that_answers_nothing_at_all(tmp_path, fault, kept):
    """Also when the log holds replies of an earlier run."""
    broken = False
    with serve(echo, lambda n, m: fault if broken else None) as server, open_replies(tmp_path / "r.jsonl") as log:
        if kept:
            ask_model(open_teacher(server.url, "m"), [user("before")], log)
        broken = True
        with pytest.raises(InputError, match="Every reply so far is kept") as e:
            ask_model(open_teacher(server.url, "m"), [user("a"), user("b")], log, retries=1)
        assert "\n" not in str(e.value) and len(log) == kept


def test_a_web_page_in_place_of_an_api_ends_the_run_after_three_tries(tmp_path):
    with serve(echo, lambda n, m: "garbage") as server, open_replies(tmp_path / "r.jsonl") as log:
        with pytest.raises(InputError, match="after 3 tries .*not JSON.*check .* that the URL is that of its chat API"):
            ask_model(open_teacher(server.url, "m"), [user("a")], log)
        assert server.posts == 6, "the request and the greeting"


def test_one_request_that_is_refused_alone_is_not_the_endpoints_fault(tmp_path):
    fault = {"poison": b'{"choices": []}'}
    with serve(echo, lambda n, m: fault.get(m[-1]["content"])) as server, open_replies(tmp_path / "r.jsonl") as log:
        replies = ask_model(open_teacher(server.url, "m"), [user("poison")], log)
        assert replies == [{"error": "HTTP 200, but the reply has no choices"}] and server.posts == 2


def test_the_wait_is_shown_in_the_bar_and_nowhere_else(tmp_path, monkeypatch, capfd):
    shown = []
    monkeypatch.setattr(workers.ReplyBar, "set_postfix_str", lambda bar, text="", refresh=True: shown.append(text))
    with (
        serve(echo, lambda n, m: (429, [("Retry-After", "1")]) if n == 0 else None) as server,
        open_replies(tmp_path / "r.jsonl") as log,
    ):
        ask_model(open_teacher(server.url, "m"), [user("q")], log)
    assert any(text.startswith("waiting 1 s: HTTP 429") for text in shown)
    assert capfd.readouterr() == ("", ""), "quiet where there is no terminal"


def test_unreachable_teacher(tmp_path):
    with closed_port() as url, open_replies(tmp_path / "r.jsonl") as log, pytest.raises(InputError) as e:
        ask_model(open_teacher(url, "m"), [user(f"q{i}") for i in range(20)], log, concurrency=4)
    assert url in str(e.value) and "\n" not in str(e.value)


def test_teacher_that_dies_keeps_what_it_answered(tmp_path):
    path = tmp_path / "r.jsonl"
    with serve(echo, lambda n, m: "drop" if n >= 10 else None) as server:
        with open_replies(path) as log, pytest.raises(InputError, match="run the same command"):
            ask_model(open_teacher(server.url, "m"), [user(f"q{i}") for i in range(20)], log, concurrency=3, retries=2)
    assert len(path.read_text().splitlines()) == 10
    with serve(echo) as server, open_replies(path) as log:  # another port, the same model
        replies = ask_model(open_teacher(server.url, "m"), [user(f"q{i}") for i in range(20)], log)
        assert [r["text"] for r in replies] == [f"re: q{i}" for i in range(20)] and server.posts == 10


@pytest.mark.parametrize("rates", [{"requests_per_minute": 2400}, {"tokens_per_minute": 15 * 2400}])
def test_rate_limits_are_kept(tmp_path, rates):
    at = []

    def faults(n, messages):
        at.append(time.monotonic())
        return 500 if n == 4 else None

    with serve(echo, faults) as server, open_replies(tmp_path / "r.jsonl") as log:
        started = time.monotonic()
        ask_model(
            open_teacher(server.url, "m"),
            [user(f"q{i}") for i in range(40)],
            log,
            concurrency=40,
            max_tokens=9,
            **rates,
        )
        assert server.posts == 41
    # 40 gaps of 25 ms; a retry is a request too; tokens are first guessed as 5 + 9, then known to be 15
    assert at[-1] - started > 0.85 * 40 * 0.025


def test_a_budget_is_never_exceeded_and_the_run_goes_on_with_a_greater_one(tmp_path):
    path = tmp_path / "r.jsonl"
    prompts = [user(f"q{i}") for i in range(30)]
    with serve(echo) as server:
        teacher = open_teacher(server.url, "m")
        with (
            open_replies(path) as log,
            pytest.raises(InputError, match=r"the budget of 200 is used up \(195 spent\); raise --budget"),
        ):
            ask_model(teacher, prompts, log, concurrency=8, max_tokens=10, budget=200)  # a reply costs 15
        assert server.posts == 13, "all that the budget bears, though 8 in flight might have taken more"
        with open_replies(path) as log:
            assert log.spent == [130, 65], "what was spent is known after a restart"
            prices = (100_000.0, 400_000.0)  # 10 * 0.1 + 5 * 0.4 = 3 a reply
            assert price(log.spent, prices) == 39.0
            with pytest.raises(
                InputError, match=r"the budget of 60 is used up \(5[47] spent\)"
            ):  # 6 + 10 tokens may cost 4.6
                ask_model(teacher, prompts, log, concurrency=8, max_tokens=10, budget=60, prices=prices)
            replies = ask_model(teacher, prompts, log, concurrency=8, max_tokens=10, budget=95, prices=prices)
        assert [r["text"] for r in replies] == [f"re: q{i}" for i in range(30)] and server.posts == 30


def test_missing_usage_is_estimated(tmp_path):
    with serve(lambda m: "x" * 30, lambda n, m: "no usage") as server, open_replies(tmp_path / "r.jsonl") as log:
        ask_model(open_teacher(server.url, "m"), [user("y" * 29)], log)
        assert log.spent == [29 // 3 + 1 + 4, 30 // 3 + 1]
