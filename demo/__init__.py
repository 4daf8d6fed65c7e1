"""The demo of run.sh: a tiny Qwen2, a small world of instructions, and its teacher."""
