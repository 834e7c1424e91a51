"""Layer 0: what may be asked for and what was built. Standard library and NumPy only."""
