"""What model.py builds on: files, flags, checkpoints, tokenizer, layers, attention, ranks."""
