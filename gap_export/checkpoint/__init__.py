"""Files of published checkpoints as named tensors; their values are never loaded here."""
