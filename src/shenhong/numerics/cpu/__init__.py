"""The kernels for CPUs: C++ in csrc/, built and checked on this machine, and the ops that call them."""
