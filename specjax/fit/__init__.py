"""Training steps of models that are not drafters: tokenizers, targets."""
