"""The training objective, paper section 4.3 and nothing else."""
