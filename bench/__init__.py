"""Benchmarks: each module is a command, and doc/performance.md has the results."""
