"""The backend "torch": PyTorch's own fused operators, on any device. Called by `ops` with arguments it has checked."""
