"""The parts of `spray bench`, which loads a server and measures it.

load.py      what to send and when: a mix of kinds of requests, or a trace
sending.py   sends one request, and records its outcome
driving.py   sends all of them: at their times, or each when another is answered
report.py    counts and percentiles of the outcomes
plot.py      a picture of them
"""
