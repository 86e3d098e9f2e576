"""Jetson: know the device and measure what layers cost on it."""
