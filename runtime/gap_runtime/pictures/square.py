"""What modes share that make a square of every picture: one bucket takes all shapes."""

from __future__ import annotations

from gap_runtime.pictures.preprocess import Bucket, Preprocess


def is_usable(spec: Preprocess, buckets: tuple[Bucket, ...]) -> bool:
    """Whether there is one bucket, for pictures of any shape."""
    del spec
    return len(buckets) == 1 and buckets[0].canvas is None


def pixel_shape(spec: Preprocess, bucket: Bucket) -> tuple[int, ...]:
    """[1, 3, side, side]."""
    del bucket
    return 1, 3, spec.side, spec.side


def find_bucket(size: tuple[int, int], spec: Preprocess, buckets: tuple[Bucket, ...]) -> Bucket:
    """The only one."""
    del size, spec
    return buckets[0]


def fitting_size(bucket: Bucket, spec: Preprocess) -> tuple[int, int]:
    """(width, height) of a picture that is neither padded nor distorted."""
    del bucket
    return spec.side, spec.side
