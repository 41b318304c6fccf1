"""Models that are not here yet."""
