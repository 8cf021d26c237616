"""Finds where to split the sequence of a model: observes its forward, proves a plan on ranks, and writes it as code.

planner.py    a class comes in, a proved plan goes out; for `spray plan`
trace.py      the calls of one forward, with the shapes of their tensors
movement.py   which dimension moves with which length
stacks.py     the blocks that hand the streams of tokens on
proposals.py  plans that fit, each a Proposal (proposal.py); local_attention.py: which attention they leave alone
source.py     a plan as Python
"""
