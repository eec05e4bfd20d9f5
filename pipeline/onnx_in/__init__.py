"""A recipe that gives an ONNX file in place of a PyTorch model: read, completed, quantized, and looked into."""
