"""One reader for each form of data, found by name."""
