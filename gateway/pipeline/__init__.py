"""The one way that every request takes, whichever door it came through."""
