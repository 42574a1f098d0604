__version__ = "0.2.0"
NAMESPACE = "zeroblock"  # of the ops; each package for the kernels hub has its own (tools/hub.py)
