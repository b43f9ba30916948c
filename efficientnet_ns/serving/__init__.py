"""Export of trained models, and a client for the servers that run them."""
