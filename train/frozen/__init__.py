"""The frozen vision-language model that the policy is trained through."""
