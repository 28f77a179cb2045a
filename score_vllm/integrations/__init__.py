"""Other tools that drive this server."""
