"""Benchmarks of a checkout: `pytest bench/ --benchmark-only`, `python -m bench.report`,
`python -m bench.compare OLD NEW`. docs/benchmarking.md says how to run and read them."""
