"""Token estimates, prices, and a run's rate limits and budget."""

import time

from core.reply_log import ReplyLog


def estimate_tokens(text: str) -> int:
    """Estimates a text's tokens before an endpoint has counted them: one for every three bytes of UTF-8.

    This overestimates: English has about four bytes per token, Chinese four to five.
    """
    return len(text.encode("utf-8", "replace")) // 3 + 1


def request_tokens(messages: list[dict]) -> int:
    return sum(estimate_tokens(m["content"]) + 4 for m in messages)  # 4: role and delimiters of a message


def price(tokens: tuple[float, float], prices: tuple[float, float] | None) -> float:
    """The price of (prompt tokens, reply tokens). prices: per million of each. Without prices: the number of tokens."""
    return sum(n * p for n, p in zip(tokens, prices)) / 1e6 if prices else sum(tokens)


class Limits:
    """The rate limits of an endpoint and the budget of a run. 0: no limit. A size is [prompt tokens, reply tokens].

    Requests are spaced evenly, retries included. A request counts with its estimated size until its reply arrives, then
    with the tokens charged. budget: limit of the cost of all replies in the log, in the unit of price().
    """

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
        self.next_request = self.next_token = 0.0  # the next one may be sent from this time.monotonic() on
        self.in_flight = [0, 0]  # most tokens that the requests in flight may cost
        self.discarded = [0, 0]  # tokens charged for replies that were not kept

    def spent(self, *more: list[int]) -> float:
        """The cost of the log's replies and of `more` sizes."""
        return price([sum(tokens) for tokens in zip(self.log.spent, self.discarded, *more)], self.prices)

    def affords(self, size: list[int]) -> bool:
        """True if one more request stays within the budget, even if it and all in flight get the longest replies."""
        return not self.budget or self.spent(self.in_flight, size) <= self.budget

    def begin(self, size: list[int]) -> None:
        self.in_flight = [a + b for a, b in zip(self.in_flight, size)]

    def finish(self, size: list[int]) -> None:
        self.in_flight = [a - b for a, b in zip(self.in_flight, size)]

    def discard(self, used: list[int]) -> None:
        """Counts the tokens of a reply that is not kept."""
        self.discarded = [a + b for a, b in zip(self.discarded, used)]

    def reserve_slot(self, size: list[int]) -> float:
        """Reserves a time slot for one more request. -> the seconds until it may be sent."""
        now = time.monotonic()
        start = max(now, self.next_request, self.next_token)
        if self.requests_per_minute:
            self.next_request = start + 60 / self.requests_per_minute
        if self.tokens_per_minute:
            self.next_token = start + 60 * sum(size) / self.tokens_per_minute
        return start - now

    def correct_rate(self, size: list[int], used: list[int]) -> None:
        """Replaces the estimated size by the tokens charged."""
        if self.tokens_per_minute:
            self.next_token += 60 * (sum(used) - sum(size)) / self.tokens_per_minute
