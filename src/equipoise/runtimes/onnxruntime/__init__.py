"""ONNX Runtime on the CPU, and on other devices through its execution providers."""
