"""How a checkpoint's values get into a bundle: planned, bound to graphs, read, written."""
