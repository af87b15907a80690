"""Benchmarks and the compile report. README.md lists the commands."""
