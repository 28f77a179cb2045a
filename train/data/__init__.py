"""Where training videos and their texts come from."""
