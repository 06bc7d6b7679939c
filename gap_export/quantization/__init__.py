"""Weights in fewer bits: which ones, how their values are found, what graphs say of them."""
