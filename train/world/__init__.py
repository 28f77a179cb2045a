"""The synthetic world: its scenes, and the demo model trained on them."""
