"""An export from start to end: numbers first, then the work, then one rename."""
