"""What scripts/gpu_check is made of. Standard library, numpy and torch only: it runs on a bare CUDA machine."""
