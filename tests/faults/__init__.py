"""Every call to the system fails once in turn; what is there afterwards is one of two states."""
