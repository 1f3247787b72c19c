"""Files in and out: weights, tokenizers, prompts."""
