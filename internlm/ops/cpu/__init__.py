"""Kernels on the CPU, and the choice between them for the processor at hand."""
