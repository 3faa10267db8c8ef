"""TensorRT 10 and 11 on NVIDIA GPUs; TensorRT-RTX shares what is here."""
