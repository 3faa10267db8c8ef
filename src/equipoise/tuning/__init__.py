"""One run of ``equipoise tune``: its settings, its recipes, the search, and what is told of it."""
