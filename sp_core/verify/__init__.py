"""Does a model give the same answer on every layout?

verify.py      the proof, for `spray verify` and the tests
divergence.py  the first module whose output differs
alone.py       a parallelized model as one rank would compute it, for a gang's self-test
rank_pool.py   gloo ranks on this machine, for proofs and benchmarks
examples.py    a tiny transformer of each known class, with inputs
"""
