"""Stages on a Ray cluster: anywhere what computes, on the target's nodes alone what measures."""
