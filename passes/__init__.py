"""The compiler: what its rooms share, and the way from a network to a plan.

capture/    a model to a program: one functional graph, one spelling per meaning
rules/      the table of sharding rules, one file per family of ops
search/     numbers to numbers: the least sum, exactly
emit/       a plan to the program of one rank, its types checked
"""
