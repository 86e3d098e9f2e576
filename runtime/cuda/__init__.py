"""CUDA for the engines that run on a GPU, by the driver API: it has no version of its own to agree with a toolkit."""
