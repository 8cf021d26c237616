"""The dashboard of gangs: how many are wanted and why, how they start and end; and of the nodes."""

from deploy.grafana.builders import Board, Panel
from deploy.grafana.promql import M, mean

GANGS = Board(
    "spray-gangs",
    "spray / Gangs and autoscaling",
    "How many gangs are wanted and why, how many there are, how they start and end.",
    {
        "Autoscaling": (
            Panel(
                "Gangs: wanted, running, allowed",
                "short",
                [
                    (f"max by (model, reason) (spray_gangs_wanted{{{M}}})", "{{model}} wanted: {{reason}}"),
                    (
                        f'sum by (model) (max by (model, state) (spray_gangs{{{M},state=~"running|updating"}}))',
                        "{{model}} running",
                    ),
                    (f"max by (model, bound) (spray_gangs_limit{{{M}}})", "{{model}} {{bound}}"),
                ],
                "The reason is why no other number is wanted.",
                width=12,
            ),
            Panel(
                "Work for each gang, and its target",
                "s",
                [
                    ('spray:backlog_seconds:per_capacity{model=~"$model"}', "{{model}}"),
                    (f"max by (model) (spray_target_backlog_seconds{{{M}}})", "{{model}} target"),
                ],
                "Seconds of work that wait or run.",
                width=12,
            ),
            Panel(
                "Waiting requests",
                "short",
                [(f"sum by (model) (spray_requests_queued{{{M}}})", "{{model}}")],
                "In all gateways.",
            ),
            Panel(
                "Wait in the queue",
                "s",
                [('spray:queue_seconds:p95{model=~"$model"}', "{{model}} p95")],
                "Of answered requests.",
            ),
            Panel(
                "Gangs by state",
                "short",
                [(f"max by (model, state) (spray_gangs{{{M}}}) > 0", "{{model}} {{state}}")],
                "Serve's states.",
            ),
        ),
        "Elastic gangs": (
            Panel(
                "Ranks without work",
                "short",
                [(f"sum by (model) (rate(spray_rank_idle_seconds_total{{{M}}}[$__rate_interval]))", "{{model}}")],
                "Ranks of elastic gangs that had no request, on average.",
            ),
            Panel(
                "Changes of ranks",
                "short",
                [
                    (
                        f"sum by (model, kind) (rate(spray_elastic_changes_total{{{M}}}[$__rate_interval]))",
                        "{{model}} {{kind}}",
                    )
                ],
                "A second: requests that took other ranks, or stood still because others needed them.",
            ),
            Panel(
                "Steps by layout",
                "short",
                [
                    (
                        f"sum by (model, layout) (rate(spray_step_seconds_count{{{M}}}[$__rate_interval]))",
                        "{{model}} {{layout}}",
                    )
                ],
                "A second, summed over ranks: who shares a step with how many.",
            ),
        ),
        "Starts and losses": (
            Panel(
                "Mean start by phase",
                "s",
                [(mean("spray_gang_start_seconds", "model, phase"), "{{model}} {{phase}}")],
                "Of the starts in the interval; the phases add up.",
            ),
            Panel(
                "Losses of ranks",
                "short",
                [
                    (
                        f"sum by (model, reason) (increase(spray_gang_restarts_total{{{M}}}[1h])) > 0",
                        "{{model}} {{reason}}",
                    ),
                    (f"sum by (model) (increase(spray_request_losses_total{{{M}}}[1h]))", "{{model}} requests"),
                ],
                "In an hour: gangs that lost their ranks, and requests that ran again.",
                warn=1,
                alarm=3,
            ),
            Panel(
                "Since the last progress",
                "s",
                [
                    (
                        f"time() - min by (model, replica) (spray_progress_timestamp_seconds{{{M}}})",
                        "{{model}}/{{replica}}",
                    )
                ],
                "Since a gang was last seen idle, or to pass a boundary of a request.",
                warn=60,
                alarm=300,
            ),
        ),
        "Nodes": (
            Panel(
                "Free disk",
                "percentunit",
                [("spray_disk_free_bytes / (spray_disk_size_bytes > 0)", "{{instance}} {{folder}}")],
                "Where each node keeps its files.",
            ),
            Panel(
                "Versions",
                "short",
                [("sum by (version) (spray_build_info)", "{{version}}")],
                "Nodes that answer, by version of spray.",
            ),
        ),
    },
)
