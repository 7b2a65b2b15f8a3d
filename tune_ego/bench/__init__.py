"""Benchmarks. Each speed is measured in alternation with the reference that it is compared with."""
