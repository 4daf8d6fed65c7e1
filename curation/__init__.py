"""The data steps of make_data.py."""
