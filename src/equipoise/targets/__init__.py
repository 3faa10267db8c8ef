"""Device profiles as data, and detection of this machine."""
