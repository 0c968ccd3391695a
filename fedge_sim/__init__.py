"""Hierarchical and clustered federated learning: client, leaf server, cloud."""
