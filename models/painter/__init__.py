"""The built-in model: its training pictures, its checkpoint, its trainer and its evaluation."""
