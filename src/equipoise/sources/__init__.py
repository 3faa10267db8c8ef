"""Trained models: where they come from, and opening them in PyTorch without trusting them."""
