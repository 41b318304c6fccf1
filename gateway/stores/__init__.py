"""What outlives a request: keys, records, usage, grammars, cache; by subject, not by engine."""
