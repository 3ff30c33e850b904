"""The parts of a layer other than attention and matrix products: LayerNorm, activations, and sums over rows."""
