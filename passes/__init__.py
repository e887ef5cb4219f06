"""The compiler, in the order data flows: capture, factors, strategies, search, schedule, codegen."""
