"""Ops for GPUs in Triton-lang (NVIDIA and AMD): one op per file, the kernel, its launcher and its variants.

A launcher has the signature of the public op. It chooses block sizes and warps with a pure function of the device's
properties and of the shapes, never by timing, so that every variant that can occur is known before the first request.
Imported only where tensors are on a GPU (or where a test asks): an installation for CPUs has no triton.
"""
