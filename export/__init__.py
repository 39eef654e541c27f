"""Write a deployable directory: checkpoint, model card, manifest, ONNX."""
