"""What `gap-export` does, one file each; every module fits gap_runtime.cli.options.Command."""
