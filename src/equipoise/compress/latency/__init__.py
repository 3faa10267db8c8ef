"""What a layer costs at each width, measured on the target, and which widths to choose for it."""
