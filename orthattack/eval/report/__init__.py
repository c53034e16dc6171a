"""What a run tells: the terminal's table, files, and the page."""
