"""The keys: a file that people edit, and the ring that a running gateway looks them up in."""
