"""The dashboard that shows why a step is slow."""

from deploy.grafana.builders import Board, Panel
from deploy.grafana.promql import RATE, M, mean, per_second

STEPS = Board(
    "spray-steps",
    "spray / Steps",
    "Where the time of a step goes: computation, communication, waiting for a slower rank.",
    {
        "All ranks": (
            Panel(
                "Seconds of a step",
                "s",
                [(f"sum by (le) (increase(spray_step_seconds_bucket{{{M}}}{RATE}))", "{{le}}")],
                "How many steps took how long.",
                "heat",
                12,
            ),
            Panel(
                "p95 by layout and shape",
                "s",
                [('spray:step_seconds:p95{model=~"$model"}', "{{model}} {{layout}} {{shape}}")],
                "The alert on slower steps compares it with the day before.",
                width=12,
            ),
        ),
        "Why": (
            Panel(
                "Computation and communication",
                "s",
                [
                    (
                        'avg by (model, replica) (spray:step_seconds:mean{model=~"$model"})'
                        ' - avg by (model, replica) (spray:collective_seconds:mean{model=~"$model"})',
                        "{{model}}/{{replica}} computes",
                    ),
                    (
                        'avg by (model, replica) (spray:collective_seconds:mean{model=~"$model"})'
                        ' - avg by (model, replica) (spray:straggler_seconds:mean{model=~"$model"})',
                        "{{model}}/{{replica}} transfers",
                    ),
                    (
                        'avg by (model, replica) (spray:straggler_seconds:mean{model=~"$model"})',
                        "{{model}}/{{replica}} waits for the slowest rank",
                    ),
                ],
                "Means of a gang's ranks; they add up to a step.",
            ),
            Panel(
                "Share of communication",
                "percentunit",
                [('spray:communication:share{model=~"$model"}', "{{model}}/{{replica}}")],
                "Of a step, waits for slower ranks included.",
                warn=0.3,
                alarm=0.5,
            ),
            Panel(
                "Share of waiting for a slow rank",
                "percentunit",
                [('spray:straggler:share{model=~"$model"}', "{{model}}/{{replica}}")],
                "Of a step, on the rank that waits most.",
                warn=0.1,
                alarm=0.2,
            ),
        ),
        "By rank": (
            Panel(
                "Step",
                "s",
                [('spray:step_seconds:mean{model=~"$model"}', "{{model}}/{{replica}} rank {{rank}}")],
                "All ranks of a gang take about as long: they wait for one another.",
            ),
            Panel(
                "Waits for slower ranks",
                "s",
                [('spray:straggler_seconds:mean{model=~"$model"}', "{{model}}/{{replica}} rank {{rank}}")],
                "The slowest rank is the one that hardly waits while the others do.",
            ),
            Panel(
                "In collectives",
                "s",
                [
                    (
                        mean("spray_collective_seconds", "model, replica, rank, op"),
                        "{{model}}/{{replica}} rank {{rank}} {{op}}",
                    )
                ],
                "Mean of a step by kind; a broadcast happens once a request.",
            ),
            Panel(
                "Sent",
                "Bps",
                [
                    (
                        per_second("spray_collective_bytes_total", "model, replica, rank, op"),
                        "{{model}}/{{replica}} rank {{rank}} {{op}}",
                    )
                ],
                "To other ranks of the gang.",
            ),
            Panel(
                "Memory",
                "bytes",
                [
                    (
                        f"max by (model, replica, rank, kind) (spray_rank_memory_bytes{{{M}}})",
                        "{{model}}/{{replica}} rank {{rank}} {{kind}}",
                    )
                ],
                "After the latest request.",
            ),
            Panel(
                "Steps",
                "ops",
                [(per_second("spray_steps_total", "model, replica"), "{{model}}/{{replica}}")],
                "Of a gang, however many ranks it has.",
            ),
        ),
    },
)
