"""The ONNX reference evaluator: slow, and right by definition of the operators."""
