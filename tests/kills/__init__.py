"""Commands killed at random moments; what is there afterwards is one of the promised states."""
