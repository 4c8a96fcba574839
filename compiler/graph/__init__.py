"""The network as a Relax module of named operators: no target, no layout, no schedule."""
