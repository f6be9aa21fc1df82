"""ONNX models in and out of the layer graph (not implemented yet)."""
