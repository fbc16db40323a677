"""Engines for NVIDIA GPUs: profiles planned, plans built by TensorRT or TensorRT for RTX, kernels compiled."""
