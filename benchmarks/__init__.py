"""Benchmarks and the compile report, run from the root of a checkout: `python -m benchmarks.run`, `python -m benchmarks.compile_report`."""
