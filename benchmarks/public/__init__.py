"""Public video question sets, run against any OpenAI-compatible endpoint; see README.md in this folder."""
