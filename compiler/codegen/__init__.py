"""From scheduled modules to files: machine code, the linked library, the bundle."""
