"""Modules become ONNX graphs: traced, repeated layer by layer, and proved."""
