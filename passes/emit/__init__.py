"""A plan to the program of one rank: local ops, collectives written in, types checked."""
