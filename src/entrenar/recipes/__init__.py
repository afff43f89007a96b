"""What a user does, each with one typed config and one function: train, check, evaluate, generate, export, inspect."""
