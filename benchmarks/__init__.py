"""Benchmarks: each is `python -m benchmarks.NAME [--json FILE]`, prints a table and runs its baseline in the same run."""
