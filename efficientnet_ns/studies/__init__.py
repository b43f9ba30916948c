"""The paper's questions, and how the answers to them are shown."""
