"""Which way a step takes: measured once per situation, kept on disk."""
