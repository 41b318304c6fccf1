"""Who may come in, and when: places and the queue, limits per key."""
