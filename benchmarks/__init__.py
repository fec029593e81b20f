"""Benchmarks: ratios to other implementations, measured in the same run."""
