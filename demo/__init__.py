"""The embedded default: a tiny Qwen2, a small instruction world, its teacher."""
