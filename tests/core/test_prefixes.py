import hypothesis
from hypothesis import strategies as st

from core.prefixes import common_prefix, prefix_lengths


def test_common_prefix_leaves_a_token():
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 1
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1, 5], [2, 5]]) == 0
    assert common_prefix([[1, 2, 9, 9], [1, 2, 3, 4, 5], [1, 2, 3, 9]]) == 2


def tokens_to_compute(prompts, lengths, overhead):
    prefixes = {tuple(p[:n]) for p, n in zip(prompts, lengths) if n}
    return sum(len(p) - n for p, n in zip(prompts, lengths)) + sum(len(p) + overhead for p in prefixes)


def test_prefix_lengths_by_hand():
    few_shot, short = list(range(100)), [0, 1, 2, 3, 4]
    prompts = [few_shot + [200, 1], short + [300], few_shot + [201], short + [301, 2], few_shot + [200, 1], [7, 7]]
    assert prefix_lengths(prompts, overhead=10) == [100, 0, 100, 0, 100, 0]
    assert prefix_lengths([prompts[1], prompts[3], [7, 7]], overhead=2) == [5, 5, 0]
    assert prefix_lengths(prompts, overhead=10**6) == [0] * 6
    assert prefix_lengths([few_shot], overhead=0) == [0]
    assert prefix_lengths([few_shot] * 3, overhead=0) == [99] * 3  # the last token is left to be fed
    assert len(prefix_lengths([[1] * n for n in range(1, 900)])) == 899  # nested deeper than Python recurses


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(0, 6)
)
def test_prefix_lengths_save_work(prompts, overhead):
    lengths = prefix_lengths(prompts, overhead)
    assert all(0 <= n < len(p) for p, n in zip(prompts, lengths))
    cost = tokens_to_compute(prompts, lengths, overhead)
    n = common_prefix(prompts) if len(prompts) > 1 else 0
    assert cost <= min(tokens_to_compute(prompts, [n] * len(prompts), overhead), sum(map(len, prompts)))
