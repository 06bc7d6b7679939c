"""The format of a bundle: its manifest, layout, files and the engines made from it."""
