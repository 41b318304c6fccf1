"""Tests of the health server and of entrypoint.sh, on real sockets and real processes."""
