"""The device side of quern: opens a bundle and generates text. Runs alone, on Python 3.8+ numpy; see README.md."""
