"""Shared by the training loops."""
