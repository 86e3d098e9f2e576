"""Runtime: run a bundle. Needs no PyTorch and no ONNX library."""
