"""The room of make_data.py."""
