"""Structured pruning of transformers models by their config, and trimming of vocabularies."""
