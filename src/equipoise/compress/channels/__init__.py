"""Channels of convolutional networks and other modules: which go together, scores, cutting them."""
