"""Benchmarks: each prints a table and states machine, sizes and what it is compared with; `make bench` runs all."""
