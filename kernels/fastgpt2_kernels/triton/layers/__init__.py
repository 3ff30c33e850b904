"""What a layer does beside attention and matrix products: LayerNorm, activations, the sums over rows behind them."""
