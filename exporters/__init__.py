"""Layer 3: from a checkpoint to one quantized ONNX graph a component, and from that to every target."""
