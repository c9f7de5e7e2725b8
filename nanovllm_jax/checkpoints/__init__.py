"""What a checkpoint's directory holds: weights (Hugging Face files, Orbax, or none), tokenizer, sampling defaults."""
