"""PyTorch to ONNX. The only folder beside compress/ that imports torch."""
