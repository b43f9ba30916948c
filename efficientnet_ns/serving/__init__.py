"""Export of trained models, and how to ask a server that runs them."""
