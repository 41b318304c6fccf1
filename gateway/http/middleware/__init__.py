"""What every request passes through before its handler, in the order of `app.py`."""
