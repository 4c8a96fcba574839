"""Quantised weights: one canonical form (`ir`), its meaning (`reference`), and the formats that decode to it."""
