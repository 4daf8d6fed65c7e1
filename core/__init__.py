"""Below model.py: files, flags, checkpoints, tokenizer, layers, attention, ranks."""
