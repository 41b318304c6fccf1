"""What is written down of requests and events, in one SQLite file, and what it adds up to."""
