"""Weight fusion: everything of merge.py except linear and TIES."""
