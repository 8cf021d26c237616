"""The command `spray`.

main.py      the commands; turns their errors into one line and an exit code
commands/    a file per command, or for a few related ones
options.py   arguments that several commands share, and wrong usage
output.py    lines and tables for a person
top.py       the table of `spray top`
progress.py  bars for loading and for steps
pictures.py  pictures inside a terminal
generation.py  one generation: by a server, as its job, or in processes of the command
client.py    an HTTP client of a running server
job_client.py  the same for jobs
request_schema.py  the JSON schema of one model's requests
bench/       the parts of `spray bench`
doctor.py    looks for common problems of a machine
demo.py      `make demo`
"""
