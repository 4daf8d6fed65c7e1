import torch

from core.sampling import sample


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log().repeat(10000, 1)
    uniform = (torch.arange(10000) + 0.5) / 10000
    frequencies = sample(logits, uniform).bincount(minlength=4) / 10000
    torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.5, 0.05, 0.35]), atol=2e-4, rtol=0)
    assert sample(logits, uniform, temperature=0.0).unique().tolist() == [1]
    assert sample(logits, uniform, top_k=1).unique().tolist() == [1]
    nucleus = sample(logits, uniform, top_p=0.6).bincount(minlength=4) / 10000  # 0.5 alone does not reach 0.6
    torch.testing.assert_close(nucleus, torch.tensor([0, 0.5 / 0.85, 0, 0.35 / 0.85]), atol=2e-4, rtol=0)
    both = sample(logits, uniform, top_k=2, top_p=0.55).bincount(minlength=4) / 10000  # of the two 0.5 has 0.59 already
    torch.testing.assert_close(both, torch.tensor([0, 1.0, 0, 0]), atol=2e-4, rtol=0)
    assert sample(logits, uniform, temperature=1e-300).unique().tolist() == [1]
    cold = sample(logits, uniform, temperature=0.5).bincount(minlength=4) / 10000
    squares = torch.tensor([0.1, 0.5, 0.05, 0.35]) ** 2
    torch.testing.assert_close(cold, squares / squares.sum(), atol=2e-4, rtol=0)


def test_top_k_beyond_the_vocabulary_keeps_all_of_it():
    logits, uniform = torch.randn(50, 7), torch.rand(50)
    assert torch.equal(sample(logits, uniform, top_k=7), sample(logits, uniform, top_k=8))


def test_top_k_and_top_p_follow_the_order_of_a_full_sort():
    g = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(200, 40, generator=g), torch.rand(200, generator=g)
    ordered, order = logits.sort(-1, descending=True)
    for k, p in ((5, 1.0), (12, 0.7), (0, 0.7)):
        share = ordered[:, : k or 40].softmax(-1)
        share = torch.where(share.cumsum(-1) - share >= p, 0.0, share)
        want = (share.cumsum(-1) / share.sum(-1, keepdim=True) <= uniform[:, None]).sum(-1)
        got = sample(logits, uniform, top_k=k, top_p=p)
        assert torch.equal(got, order.gather(1, want[:, None])[:, 0])
