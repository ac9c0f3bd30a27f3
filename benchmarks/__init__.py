"""What the operators and the network cost beside eager PyTorch and torch.compile, measured in one run."""
