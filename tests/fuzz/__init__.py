"""Damaged and odd input for every border: `make fuzz MINUTES=10`, and samples in `make test`."""
