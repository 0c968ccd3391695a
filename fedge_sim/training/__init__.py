"""What a client does with a model: train it, evaluate it."""
