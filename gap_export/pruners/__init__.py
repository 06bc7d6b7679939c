"""Pruning strategies, one file each; every module fits gap_export.interfaces.features.Pruner."""
