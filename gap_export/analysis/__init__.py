"""Questions about models and finished exports: accuracy, positions, counts, the report."""
