"""Rules by which answers become scores, one file each; fits gap_runtime.rec.protocol.Protocol."""
