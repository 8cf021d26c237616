"""Where is the sequence of a model split? Found by looking at its forward, proved on ranks, written down to be read.

planner.py    a class comes in, a proved plan goes out; for `spray plan`
trace.py      the calls of one forward, with the shapes of their tensors
movement.py   which dimension moves with which length
stacks.py     the blocks that hand the streams of tokens on
proposals.py  plans that fit, each a Proposal (proposal.py); local_attention.py: which attention they leave alone
source.py     a plan as Python
"""
