"""The dashboard of calls over REST and gRPC, and of jobs."""

from deploy.grafana.builders import Board, Panel
from deploy.grafana.promql import per_second, quantile

API = Board(
    "spray-api",
    "spray / API",
    "Calls over REST and gRPC, by route, status and key.",
    {
        "Calls": (
            Panel(
                "By route and status",
                "reqps",
                [("sum by (route, code) (rate(spray_api_requests_total[$__rate_interval]))", "{{route}} {{code}}")],
                "All routes and RPCs; `unknown` are paths that do not exist.",
                width=12,
            ),
            Panel(
                "By key",
                "reqps",
                [("sum by (key) (rate(spray_api_requests_total[$__rate_interval]))", "{{key}}")],
                "Without name: no key, or a wrong one.",
                width=12,
            ),
            Panel(
                "p95 by route",
                "s",
                [(quantile(0.95, "spray_api_seconds", "route", ""), "{{route}}")],
                "To the end of the answer; of a stream, to its last event.",
            ),
            Panel(
                "Faults of the server",
                "reqps",
                [
                    (
                        'sum by (route) (rate(spray_api_requests_total{code=~"50[0-35-9]|INTERNAL|UNAVAILABLE|ABORTED"}'
                        "[$__rate_interval])) or vector(0)",
                        "{{route}}",
                    )
                ],
                "Statuses 5xx but 504, a deadline of the caller, and their like in gRPC.",
                warn=0.01,
                alarm=1,
            ),
            Panel(
                "Prompt tokens",
                "short",
                [(per_second("spray_prompt_tokens_total", "model"), "{{model}} tokens/s")],
                "What text encoders have read.",
            ),
        ),
        "Jobs": (
            Panel(
                "Jobs that have not ended",
                "short",
                [('max by (model, state) (spray_jobs{model=~"$model"})', "{{model}} {{state}}")],
                "By model. Queued ones wait for a gang; those that run have a lease.",
            ),
            Panel(
                "Jobs that end",
                "short",
                [
                    (
                        'max by (model, state) (increase(spray_jobs_ended{model=~"$model"}[$__rate_interval]))',
                        "{{model}} {{state}}",
                    )
                ],
                "By how they ended. The count is kept in the store, so no restart interrupts it.",
            ),
            Panel(
                "p95 of the store",
                "s",
                [(quantile(0.95, "spray_job_store_seconds", "operation", ""), "{{operation}}")],
                "Calls of the store of jobs by operation, with their retries.",
                warn=1,
                alarm=5,
            ),
            Panel(
                "Errors of the store",
                "ops",
                [("sum by (operation) (rate(spray_job_store_errors_total[$__rate_interval]))", "{{operation}}")],
                "Calls that the store did not answer.",
                warn=0.001,
                alarm=0.1,
            ),
        ),
    },
)
