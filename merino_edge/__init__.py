"""merino-edge: design, train, export and run small language models for NVIDIA Jetson boards."""

__version__ = "0.1.0"
