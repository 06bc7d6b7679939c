"""Benchmarks that anyone can run; every figure in the documents comes from one of them."""
