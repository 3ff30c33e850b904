"""Other libraries: what they call in place of their own."""
