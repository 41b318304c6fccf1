"""The container image: built without a registry, run without a daemon, looked at from outside."""
