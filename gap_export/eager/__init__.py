"""Models run plainly in PyTorch for the reference; shares no code with the graphs."""
