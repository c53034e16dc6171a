"""A stored run as numbers: outcomes, rates, paired differences."""
