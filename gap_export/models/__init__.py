"""Model families, one file each; every module fits gap_export.interfaces.family.Family."""
