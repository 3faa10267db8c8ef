"""Prune, distil and train a model again, in PyTorch, before it is exported."""
