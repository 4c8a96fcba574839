"""Speed of a bundle on this machine, beside the memory bandwidth that bounds it."""
