"""The `gap-runtime` command. Results on stdout, everything for people on stderr."""
