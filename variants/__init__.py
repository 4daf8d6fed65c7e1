"""One paper, one file: each changes of the recipe only what its paper changes. README.md says when to use which."""
