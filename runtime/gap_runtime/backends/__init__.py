"""Backends, one file each; every module here fits gap_runtime.session.Backend."""
