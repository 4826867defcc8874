"""Text: documents, and windows of token ids packed from them."""
