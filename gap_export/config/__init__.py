"""What the user asks for: configuration files, flags and `--set`, as frozen records.

records   everything that decides an export
load      a name, flags and `--set` become one record
files     model files, and what else leads to a model
shipped   what travels with the package
families  which family a checkpoint is of
pruners   which pruner a name stands for
counts    ratios and counts: how many tokens stay
"""
