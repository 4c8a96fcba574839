"""CUDA kernels, one file a family: text templates around `quern.cuh`, for targets that have a `gpu`."""
