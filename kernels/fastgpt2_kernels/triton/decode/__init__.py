"""A decoding step: attention against the KV cache, linear layers for a few rows, and the step built from them."""
