"""Memory: layouts, types, addresses, devices; nothing of optimizers."""
