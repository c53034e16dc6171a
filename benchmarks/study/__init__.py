"""The study of docs/study.md: what orthogonal perturbations are good for. `python -m benchmarks.study --help`."""
