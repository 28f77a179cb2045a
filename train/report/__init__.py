"""The page about a finished training: how it went, what the policy keeps, and what that costs beside the baselines."""
