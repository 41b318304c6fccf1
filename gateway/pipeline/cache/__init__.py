"""The response cache on the way of a request; where answers lie is the matter of `stores`."""
