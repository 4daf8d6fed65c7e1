"""The sum of each example's log-probabilities, with gradients and without; hidden states."""

import random

import pytest
import torch

from core.distributed import Ranks
from model import Qwen2
from training.logps import example_logps, hidden_states, sequence_logps, sum_by_owner


def test_sum_by_owner_is_index_add():
    """Also for examples without tokens, at the beginning, in between and at the end."""
    g = torch.Generator().manual_seed(0)
    for owner, n in (([1, 1, 3, 3, 3, 4], 7), ([0, 0], 1), ([2], 3), ([0, 1, 2], 3)):
        owner = torch.tensor(owner)
        logps = torch.randn(len(owner), generator=g).requires_grad_()
        weights = torch.randn(n, generator=g)
        got, want = sum_by_owner(logps, owner, n), torch.zeros(n).index_add(0, owner, logps)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(x @ weights, logps)[0] for x in (got, want)]
        assert torch.equal(*grads)


def test_hidden_states_are_those_of_each_sequence_alone(tiny):
    model, sequences = Qwen2.from_pretrained(tiny), [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    with torch.no_grad():
        want = [model.hidden(torch.tensor([ids]))[0] for ids in sequences]
    for micro_tokens, world in (1, 1), (6, 1), (1000, 1), (6, 2), (6, 5):
        ranks = [Ranks(rank, world) for rank in range(world)]
        found = [pair for r in ranks for pair in hidden_states(model, sequences, micro_tokens, r)]
        assert sorted(i for i, _ in found) == [0, 1, 2]
        for i, hidden in found:
            torch.testing.assert_close(hidden, want[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(9, 40), (30, 220), (100, 400), (300, 500)])
def test_in_bf16_a_model_is_its_own_reference(tiny, kernels, lengths):
    """Two completions of each prompt, of at most and of more than 256 tokens."""
    model, g, examples = Qwen2.from_pretrained(tiny), random.Random(0), []
    model.compute_dtype = torch.bfloat16
    draw = lambda n: [g.randrange(3, 500) for _ in range(n)]
    prompts = [draw(lengths[0]) for _ in range(4)]
    for n, prompt in zip(torch.linspace(5, lengths[1] - lengths[0], 8).long().tolist(), prompts * 2):
        examples.append((prompt + draw(n), [False] * len(prompt) + [True] * n))
    policy = torch.cat([example_logps(model, examples[i : i + 3]).detach() for i in (0, 3, 6)])
    torch.testing.assert_close(sequence_logps(model, examples, 600), policy, rtol=0, atol=1e-3)
