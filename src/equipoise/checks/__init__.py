"""Checking engines against the model they were made from: sides, runs, verdicts."""
