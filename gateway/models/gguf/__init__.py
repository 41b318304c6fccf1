"""Model files: what they say of themselves."""
