"""What requests cost: token estimates, prices, and the limits that a run keeps to."""

import time

from core.reply_log import ReplyLog


def tokens_of(text: str) -> int:
    """A cautious estimate of a text's tokens, until an endpoint has counted them: one for every three bytes of UTF-8.

    English has about four bytes a token, Chinese four to five."""
    return len(text.encode("utf-8", "replace")) // 3 + 1


def request_tokens(messages: list[dict]) -> int:
    return sum(tokens_of(m["content"]) + 4 for m in messages)  # 4: the role and the marks around a message


def price(tokens: tuple[float, float], prices: tuple[float, float] | None) -> float:
    """tokens: (of prompts, of replies). prices: currency per million of either -> currency; without prices, tokens."""
    return sum(n * p for n, p in zip(tokens, prices)) / 1e6 if prices else sum(tokens)


class Limits:
    """An endpoint's rates and the budget of a run; 0 is no limit. A size is [tokens of a prompt, tokens of its reply].

    Requests are spaced evenly, retries included. Tokens count as estimated before a reply, and as charged after it.
    budget: bounds the cost of all replies in the log, in the unit of price()."""

    def __init__(
        self,
        log: ReplyLog,
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        budget: float = 0,
        prices: tuple[float, float] | None = None,
    ):
        self.log, self.budget, self.prices = log, budget, prices
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self.next_request = self.next_token = 0.0  # time.monotonic() from which the next one may be sent
        self.held = [0, 0]  # tokens that the requests in flight may cost
        self.set_aside = [0, 0]  # tokens charged for replies that were not kept

    def spent(self, *more: list[int]) -> float:
        """What this log's replies have cost, and what `more` sizes would add."""
        return price([sum(tokens) for tokens in zip(self.log.spent, self.set_aside, *more)], self.prices)

    def affords(self, size: list[int]) -> bool:
        """Whether the longest replies to one more request and to all in flight would stay within the budget."""
        return not self.budget or self.spent(self.held, size) <= self.budget

    def hold(self, size: list[int]) -> None:
        self.held = [a + b for a, b in zip(self.held, size)]

    def let_go(self, size: list[int]) -> None:
        self.held = [a - b for a, b in zip(self.held, size)]

    def wait(self, size: list[int]) -> float:
        """Reserves the time of one more request -> the seconds until it may be sent."""
        now = time.monotonic()
        start = max(now, self.next_request, self.next_token)
        if self.requests_per_minute:
            self.next_request = start + 60 / self.requests_per_minute
        if self.tokens_per_minute:
            self.next_token = start + 60 * sum(size) / self.tokens_per_minute
        return start - now

    def charge(self, size: list[int], used: list[int]) -> None:
        """Corrects the token rate once a request's true tokens are known."""
        if self.tokens_per_minute:
            self.next_token += 60 * (sum(used) - sum(size)) / self.tokens_per_minute
