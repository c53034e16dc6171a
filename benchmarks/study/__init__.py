"""The study of docs/study.md: what orthogonal perturbations are good for, measured. `python -m benchmarks.study --help`."""
