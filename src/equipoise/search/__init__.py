"""The sweet spot: candidates, verdicts, and the choice among them."""
