"""The Jetson room: what a board is, and what a model costs on it."""
