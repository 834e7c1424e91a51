"""Layer 1: from an artifact to pictures. NumPy, tokenizers and Pillow; engines are imported where they are used."""
