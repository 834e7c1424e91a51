"""Layer 2: number formats as pure NumPy pairs, and the rewrite of an ONNX graph to them."""
