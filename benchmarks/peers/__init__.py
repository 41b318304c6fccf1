"""Proxies that were written for the comparison."""
