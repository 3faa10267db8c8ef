"""TensorRT-RTX, which builds engines on machines without a GPU."""
