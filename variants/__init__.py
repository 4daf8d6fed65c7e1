"""One file per paper. Each changes only what its paper changes. README.md says when to use which."""
