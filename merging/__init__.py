"""The room of merge.py."""
