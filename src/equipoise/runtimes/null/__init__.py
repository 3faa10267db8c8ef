"""A runtime that does everything except compute: for tests of what stands around a runtime."""
