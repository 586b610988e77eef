"""Benchmarks against the naive autograd path. `make bench` runs the suites, `python -m benchmarks.head` the headline ratios."""
