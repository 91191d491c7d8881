"""Fused kernels for GPUs, written in Triton, each beside its plain twin in torch.

A wrapper runs its kernel for tensors on a GPU and the twin for all others. Without Triton every wrapper is its twin.
With `TRITON_INTERPRET=1` in the environment before Triton is imported, Triton's interpreter runs the kernels on a CPU:
slow, and what proves them where there is no GPU. Nothing here is imported before something asks for it.
"""
