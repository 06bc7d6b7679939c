"""The model run plainly in PyTorch, to compare with; shares no code with the graphs."""
