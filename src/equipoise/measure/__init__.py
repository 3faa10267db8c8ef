"""Latency, memory and the statistics that make them claims."""
