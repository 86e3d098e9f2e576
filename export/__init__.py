"""Export: write a checkpoint as an ONNX graph, quantise it, and prove that it computes the same."""
