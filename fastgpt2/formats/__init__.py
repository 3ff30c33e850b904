"""Checkpoint formats: Hugging Face's and nanoGPT's, on this machine or on the hub."""
