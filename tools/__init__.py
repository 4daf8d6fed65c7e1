"""Programs for speed, plots, memory estimates and HTML pages."""
