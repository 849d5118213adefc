"""The CIFAR-100 side: networks, distillers, data and the training loop."""
