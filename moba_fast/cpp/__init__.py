"""The steps in C++ for CPUs, in the same files as their Triton kernels.

Compiled by the C++ compiler of the machine when they are first needed, see `build`.
"""
