"""The command `spray`.

main.py      the commands, and what their errors become: one line and an exit code
commands/    a file per command, or for a few that belong together
options.py   arguments that several commands have, and wrong usage
output.py    lines and tables for a person
progress.py  bars for loading and for steps
pictures.py  pictures inside a terminal
generation.py  one generation: by a server, as its job, or in processes of the command
client.py    an HTTP client of a running server
job_client.py  the same for jobs
request_schema.py  what a request of one model may say
bench/       the parts of `spray bench`
doctor.py    what commonly goes wrong on a machine
demo.py      `make demo`
"""
