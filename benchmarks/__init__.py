"""Benchmarks: how fast trimtab is, next to what a user would otherwise run. Each is ``python -m benchmarks.<name>``."""
