"""Tuning: which knobs of a schedule are fastest for a shape on a device, measured, recorded, and found by `build`."""
