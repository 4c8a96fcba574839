"""Rewrites of the graph, one file each, called in the order that compiler/pipeline.py shows."""
