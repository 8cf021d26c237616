"""Dashboards for Grafana, as code. `python -m deploy.grafana` writes the JSON files beside this one.

overview.py, steps.py, gangs.py, api.py   the panels, and the queries of each
promql.py     parts of the queries
builders.py   panels as Grafana's JSON, by its foundation SDK, which only this folder needs

`tests/deploy/test_grafana.py` runs every query against a Prometheus with data.
"""
