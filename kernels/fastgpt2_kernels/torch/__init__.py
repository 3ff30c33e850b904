"""The backend "torch": PyTorch's own fused operators, on any device. `ops` calls it with checked arguments."""
