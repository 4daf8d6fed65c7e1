"""core/progress.py."""

import pytest

from core.progress import ReplyBar


@pytest.fixture
def clock(monkeypatch):
    """Sets the time of core/progress.py, in seconds."""
    now = [1000.0]
    monkeypatch.setattr("core.progress.time.time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_a_line_a_minute_where_there_is_no_terminal(clock, capsys):
    with ReplyBar(9, "label") as bar:
        for seconds, line in ((1059.0, ""), (1060.0, "label: 2 of 9 replies\n"), (1119.0, "")):
            clock(seconds)
            bar.update()
            assert capsys.readouterr() == ("", line)
        clock(1121.0)
        bar.set_postfix_str("waiting 8 s: HTTP 500: down")
        assert capsys.readouterr() == ("", "label: 3 of 9 replies, waiting 8 s: HTTP 500: down\n")
        clock(1125.0)
        bar.set_postfix_str("waiting 16 s: HTTP 500: down")
        assert capsys.readouterr() == ("", "")


def test_a_terminal_has_the_bar_and_another_rank_has_nothing(clock, capsys, monkeypatch):
    with ReplyBar(2, "q", hidden=True) as bar:
        clock(2000.0)
        bar.update()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with ReplyBar(2, "q") as bar:
        clock(3000.0)
        bar.update()
    shown = capsys.readouterr().err
    assert "q:" in shown and "2 replies" not in shown
