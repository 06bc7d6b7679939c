"""The commands of `gap-runtime`, one file each; fits gap_runtime.cli.options.Command."""
