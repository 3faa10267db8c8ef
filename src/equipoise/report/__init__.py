"""HTML page and terminal tables."""
