"""What the embedded tiny model learns from: its tasks, its tokenizer and its training data."""
