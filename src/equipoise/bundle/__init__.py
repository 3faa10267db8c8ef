"""The directory that ships: manifest, hashes, golden vectors."""
