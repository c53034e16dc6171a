"""A run at work: its units, the worker, the judge."""
