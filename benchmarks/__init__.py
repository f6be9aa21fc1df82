"""Benchmarks: ``python -m benchmarks.NAME [--quick] [--json FILE]`` from the project's root."""
