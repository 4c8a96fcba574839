"""The device side of quern: opens a bundle and generates text. Works alone, on Python 3.9+ with numpy; see README.md."""
