"""The paper's claims tested on real models. `python -m experiments.report` writes docs/REPORT.md."""
