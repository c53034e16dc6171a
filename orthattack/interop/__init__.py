"""Other libraries: our attacks as theirs, theirs as ours. Each module needs its library only if it says so."""
