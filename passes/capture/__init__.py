"""A model to a program: torch.export, made functional, one spelling per meaning, no draw lost."""
