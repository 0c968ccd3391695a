"""Plain federated averaging in Flower: what fedge_sim is measured against."""
