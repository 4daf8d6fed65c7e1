"""The basis of model.py: files, flags, checkpoints, tokenizer, layers, attention, ranks."""
