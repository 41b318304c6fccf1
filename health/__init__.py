"""The health server: tells a platform what the gateway last published, from one file and the standard library alone."""
