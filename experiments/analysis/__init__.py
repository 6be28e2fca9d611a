"""What bench.py and parameters.py measure and count: cases, sizes, readers, and their PyTorch equivalents."""
