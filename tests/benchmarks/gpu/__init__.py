"""Benchmarks for a card. They run on the CPU too, with small sizes, so that no line is untried before there is one."""
