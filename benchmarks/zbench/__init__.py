"""The parts of the benchmarks: what is measured (cases), against what (candidates), and what becomes of it (rows).

The scripts beside this folder are the entries. Cases by group: `ops.py` (memory_bound), `blocks.py` (zero, dense,
frozen), `calls.py` (overhead), `saved.py` (saved), `models.py` (models), `whole.py` (whole), `peak.py` (peak;
`holders.py` tells who holds it).
"""
