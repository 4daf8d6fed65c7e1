"""Weight fusion: everything of merge.py but linear and TIES."""
