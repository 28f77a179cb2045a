"""Re-captioning a dataset with a teacher model (paper section 5.1)."""
