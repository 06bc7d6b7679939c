"""Parts that several model families are made of: towers, decoders, ONNX operators."""
