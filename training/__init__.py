"""Shared by both training loops."""
