"""Benchmarks of effops against its rivals; see benchmarks/README.md."""
