"""Benchmarks: each is `python -m benchmarks.NAME [--json FILE]`, prints a table, runs its baseline too."""
