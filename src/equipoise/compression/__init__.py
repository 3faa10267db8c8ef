"""Pruning and training joined with export, engines and measuring."""
