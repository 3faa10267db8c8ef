"""What a running bundle does beside computing: opening, counting, batching, testing itself."""
