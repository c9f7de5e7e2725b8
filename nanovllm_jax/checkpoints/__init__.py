"""Where weights come from: Hugging Face files, or random numbers."""
