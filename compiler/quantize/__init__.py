"""Turning dense weights into quantised ones: one method a file."""
