"""Benchmarks: every speed beside its yardstick, measured in turn in one run."""
