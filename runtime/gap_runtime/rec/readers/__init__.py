"""Formats of data, one file each; fits gap_runtime.rec.source.Reader."""
