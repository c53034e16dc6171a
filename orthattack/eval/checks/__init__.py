"""The trust checks: short attacks of their own, and what their results mean."""
