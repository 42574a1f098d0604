"""The forwards of residual blocks, whoever owns their layers: `zeroblock.nn` and the converted blocks run these."""
