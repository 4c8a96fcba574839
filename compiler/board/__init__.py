"""An emulated Raspberry Pi 4: root.py (what lies on it), qemu.py (how something runs there), counts.py (what ran)."""
