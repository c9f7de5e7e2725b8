"""Where weights come from: Hugging Face files, Orbax, or random numbers."""
