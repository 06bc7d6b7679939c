"""Checkpoints and pictures as their originals' savers write them, small and random."""
