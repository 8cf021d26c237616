"""The dashboard that is looked at first: traffic, errors, latency and use, by model."""

from deploy.grafana.builders import Board, Panel
from deploy.grafana.promql import RATE, M, mean, per_second, quantile

FAILED = 'outcome=~"queue_full|model_unavailable|worker_lost|internal_error|generation_failed"'

OVERVIEW = Board(
    "spray-overview",
    "spray / Overview",
    "Traffic, errors, latency and use, by model.",
    {
        "Now": (
            Panel(
                "Requests that wait or run",
                "short",
                [(f"sum(spray_requests_in_flight{{{M}}})", "in flight")],
                "In all gateways.",
                "number",
                6,
            ),
            Panel(
                "Gangs that serve",
                "short",
                [(f"sum(spray_capacity_seconds{{{M}}})", "gangs")],
                "A gang whose ranks are replaced does not count.",
                "number",
                6,
            ),
            Panel(
                "Refused or failed",
                "percentunit",
                [
                    (
                        f"(sum(rate(spray_requests_total{{{M},{FAILED}}}{RATE})) or vector(0))"
                        f" / (sum(rate(spray_requests_total{{{M}}}{RATE})) > 0)",
                        "share",
                    )
                ],
                "Of the requests that ended; callers' own mistakes do not count.",
                "number",
                6,
                warn=0.01,
                alarm=0.05,
            ),
            Panel(
                "Work per gang",
                "s",
                [('max(spray:backlog_seconds:per_capacity{model=~"$model"})', "of the busiest model")],
                "Seconds of work that wait or run, for each gang that serves.",
                "number",
                6,
                warn=30,
                alarm=120,
            ),
        ),
        "Traffic": (
            Panel(
                "Requests by outcome",
                "reqps",
                [(per_second("spray_requests_total", "model, outcome"), "{{model}} {{outcome}}")],
                "Finished requests.",
            ),
            Panel(
                "Latency",
                "s",
                [
                    (quantile(0.5, "spray_request_seconds", "model"), "{{model}} median"),
                    (quantile(0.95, "spray_request_seconds", "model"), "{{model}} p95"),
                ],
                "An answered request, from admission to result.",
            ),
            Panel(
                "Mean seconds by stage",
                "s",
                [
                    (
                        mean("spray_stage_seconds", "model, stage", f'{M},rank=~"0|"'),
                        "{{model}} {{stage}}",
                    )
                ],
                "On rank 0. The queue is the part in which no gang computed the request.",
            ),
        ),
        "Use": (
            Panel(
                "Gangs at work",
                "percentunit",
                [
                    (
                        'sum by (model) (rate(spray_stage_seconds_sum{model=~"$model",rank="0",'
                        f'stage=~"encode|prepare|denoise|decode"}}{RATE}))'
                        " / (sum by (model) (spray_capacity_seconds{" + M + "}) > 0)",
                        "{{model}}",
                    )
                ],
                "The share of time in which a gang computes. Counted when a stage ends, so long steps come in jumps.",
            ),
            Panel(
                "Pixels drawn",
                "short",
                [(per_second("spray_pixels_total", "model"), "{{model}} pixels/s")],
                "All frames of a video.",
            ),
            Panel(
                "Memory of the fullest rank",
                "percentunit",
                [
                    (
                        f'max by (model) (spray_rank_memory_bytes{{{M},kind="peak"}}'
                        f' / ignoring (kind) (spray_rank_memory_bytes{{{M},kind="limit"}} > 0))',
                        "{{model}}",
                    )
                ],
                "The most in its latest request, as a share of its limit. The alert looks at the same.",
                warn=0.9,
                alarm=0.95,
            ),
        ),
    },
)
