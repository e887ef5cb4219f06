"""The compiler, in data's order: capture, factors, strategies, search, schedule, codegen."""
