"""What neither onnx.checker nor ONNX Runtime looks at in a model, and what both let pass."""
