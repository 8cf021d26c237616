"""Parts of queries to Prometheus. `$model` is the user's choice in a dashboard; `$__rate_interval` spans a few scrapes.

Series that `prometheus/rules.yml` records are queried by name, so that an alert and its panel show the same number.
"""

M = 'model=~"$model"'
RATE = "[$__rate_interval]"


def quantile(share: float, metric: str, by: str, where: str = M) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({metric}_bucket{{{where}}}{RATE})))"


def mean(metric: str, by: str, where: str = M) -> str:
    """The mean of a histogram; nothing where nothing was observed, for instance in a process that has ended."""
    total, count = (f"sum by ({by}) (rate({metric}_{part}{{{where}}}{RATE}))" for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def per_second(metric: str, by: str, where: str = M) -> str:
    """The rate of a counter."""
    return f"sum by ({by}) (rate({metric}{{{where}}}{RATE}))"
