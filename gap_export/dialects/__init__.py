"""What graphs are written in, for each kind of runtime; fits gap_export.interfaces.dialect."""
