"""Benchmarks, likelihoods, replies, statistics and the judge of eval.py."""
