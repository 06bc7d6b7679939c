"""The graphs of a bundle as torch modules; each file opens with its inputs and outputs."""
