"""Parts of the model: modules and what they attend with."""
