"""equipoise: the smallest, fastest engine that is still accurate enough, and the proof."""
