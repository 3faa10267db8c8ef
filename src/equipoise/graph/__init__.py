"""Passes and questions over ONNX graphs."""
