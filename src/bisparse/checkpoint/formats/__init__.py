"""File formats: recognition by content, and readers that return plain tensors or raise an error with a remedy."""
