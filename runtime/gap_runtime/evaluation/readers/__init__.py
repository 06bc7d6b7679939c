"""Formats of data, one file each; fits gap_runtime.evaluation.source.Reader."""
