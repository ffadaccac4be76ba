"""File formats: what a file or folder is by its content, and readers that yield plain tensors or a refusal with a remedy."""
