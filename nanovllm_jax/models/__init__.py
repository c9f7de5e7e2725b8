"""The model and the step that serves it."""
