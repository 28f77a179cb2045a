"""Pictures of what each method keeps (``score-viz``)."""
