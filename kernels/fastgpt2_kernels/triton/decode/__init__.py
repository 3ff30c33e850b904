"""A decoding step: attention against the KV cache, linear maps of a few rows, and the step that they make up."""
