"""Faults of processes and storage, injected for real: every test kills, cuts off or fills up something that exists."""
