"""The programs behind `python -m zeroblock`, and the small models they use."""
