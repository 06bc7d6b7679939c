"""What graphs are written in, one file for each kind of runtime; fits gap_export.dialect."""
