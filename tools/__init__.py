"""Speed, plots, memory: programs around the recipe."""
