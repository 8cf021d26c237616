"""Dashboards for Grafana, as code. `python -m deploy.grafana` writes the JSON files beside this one.

overview.py, steps.py, gangs.py, api.py   the panels, and what each asks Prometheus
promql.py     parts of these questions
builders.py   panels as Grafana's JSON, by its foundation SDK, which only this folder needs

`tests/deploy/test_grafana.py` asks a Prometheus with data every question in them.
"""
