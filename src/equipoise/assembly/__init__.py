"""Engines into a bundle: parts that were run, and what is written of them."""
