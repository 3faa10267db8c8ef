"""How an engine's outputs compare with the reference."""
