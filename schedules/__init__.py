"""Kernel families: what each operator of the graph becomes on a target. One file a family; see kernel.py."""
