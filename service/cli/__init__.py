"""The command `spray`.

main.py      the commands and their flags
commands.py  check, serve, build, deploy, ps, models, schema, doctor
generate.py  `spray generate`
doctor.py    what commonly goes wrong on a machine
demo.py      `make demo`
client.py    an HTTP client of a running server
progress.py, table.py, printing.py  what a person sees
"""
