"""The programs that `python -m zeroblock` starts: demo.py, bench.py, and the small models they use."""
