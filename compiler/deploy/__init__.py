"""Bring a bundle to a device over SSH and run it there.

connection.py (SSH), machine.py (does it fit), versions.py (copy and switch), running.py (what was copied).
"""
