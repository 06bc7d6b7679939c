"""The `gap-export` command. Results on stdout, everything for people on stderr."""
