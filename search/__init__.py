"""Search: score architectures without training and find the best one under a budget."""
