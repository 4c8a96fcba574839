"""Bring a bundle to a device over SSH: connection.py (SSH), machine.py (does it fit), versions.py (copy and switch)."""
