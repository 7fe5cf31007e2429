"""The papers' experiments on real CIFAR: protocols, training, records, report."""
