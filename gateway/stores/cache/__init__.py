"""Where the response cache keeps answers: SQLite and memory, or Redis; and vectors for those that mean the same."""
