"""What `gap-export` does besides exporting, one file each; fits gap_runtime.command.Command."""
