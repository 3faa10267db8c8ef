"""Runtimes: for each one a builder that makes an engine and a session that runs it."""
