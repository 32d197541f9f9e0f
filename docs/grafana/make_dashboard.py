"""Makes `vllm_accel.json`, a Grafana dashboard of our counters: run it after adding one.

Every panel asks twice, by the names of a plain `/metrics` and by those of Ray's metrics
port; whichever is scraped answers.
"""

import ast
import json
from pathlib import Path

HERE = Path(__file__).parent
METRICS = HERE.parents[1] / "vllm_accel" / "host" / "metrics.py"
DASHBOARD = HERE / "vllm_accel.json"

RATE = 'rate({metric}{{model_name=~"$model"}}[$__rate_interval])'

RATIOS = {
    "Draft tokens accepted": (
        "accel_accepted_tokens",
        "accel_drafted_tokens",
        "percentunit",
    ),
    "Tokens per request and step": ("accel_output_tokens", "accel_request_steps", "short"),
    "Layers per token": ("accel_layer_rows", "accel_output_tokens", "short"),
}
"""Title: numerator, denominator, unit; per replica."""

SHARES = {
    "Gate decisions": ("accel_gate_decisions", "state, reason"),
    "Tokens drafted per request and step": ("accel_draft_length", "length"),
}
"""Title: counter, labels; as rates on top of each other."""


def names() -> dict[str, str]:
    """Counter, without `vllm:`, to what it counts; read from the source."""
    for node in ast.parse(METRICS.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
            known = ast.literal_eval(node.value)
            return {name.removeprefix("vllm:"): text for name, text in known.items()}
    raise LookupError(f"no HELP in {METRICS}")


def plain(name: str) -> str:
    """A counter's name at `/metrics`."""
    return f"vllm:{name}_total"


def ray(name: str) -> str:
    """A counter's name on the metrics port of a Ray node."""
    return f"ray_vllm_{name}_total"


def dashboard(counters: dict[str, str]) -> dict:
    """The dashboard of all counters, the telling ratios first."""
    panels = [
        *(ratio(title, *of) for title, of in RATIOS.items()),
        *(share(title, *of) for title, of in SHARES.items()),
        *(rate(name, text) for name, text in counters.items()),
    ]
    for place, panel in enumerate(panels):
        panel["id"] = place + 1
        panel["gridPos"] = {"x": place % 2 * 12, "y": place // 2 * 8, "w": 12, "h": 8}
    return {
        "title": "vllm_accel",
        "uid": "vllm-accel",
        "tags": ["vllm", "speculative decoding"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [datasource(), model()]},
        "panels": panels,
    }


def ratio(title: str, upper: str, lower: str, unit: str) -> dict:
    """Of two counters' rates."""

    def asked(naming, by):
        above, below = (RATE.format(metric=naming(name)) for name in (upper, lower))
        return f"sum by ({by}) ({above}) / sum by ({by}) ({below})"

    return timeseries(title, unit, asked)


def share(title: str, name: str, labels: str) -> dict:
    """A counter by its labels, all replicas together."""

    def asked(naming, by):
        return f"sum by ({labels}) ({RATE.format(metric=naming(name))})"

    panel = timeseries(title, "short", asked)
    panel["fieldConfig"]["defaults"]["custom"] = {
        "stacking": {"mode": "percent"},
        "fillOpacity": 40,
    }
    for target in panel["targets"]:
        target["legendFormat"] = " ".join(f"{{{{{x}}}}}" for x in labels.split(", "))
    return panel


def rate(name: str, text: str) -> dict:
    """A counter per second and replica."""

    def asked(naming, by):
        return f"sum by ({by}) ({RATE.format(metric=naming(name))})"

    title = name.removeprefix("accel_").replace("_", " ").capitalize()
    panel = timeseries(f"{title} per second", "short", asked)
    panel["description"] = text
    return panel


def timeseries(title: str, unit: str, asked) -> dict:
    """A panel that asks for both names; `asked(naming, by)` gives the expression."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    spoken = [("A", plain, "instance"), ("B", ray, "ReplicaId")]
    return {
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {
                "refId": ref,
                "datasource": source,
                "expr": asked(naming, by),
                "legendFormat": f"{{{{{by}}}}}",
            }
            for ref, naming, by in spoken
        ],
    }


def datasource() -> dict:
    """The choice of a Prometheus."""
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
    }


def model() -> dict:
    """The choice of models, by either name of a counter that every engine has."""
    either = "|".join(name("accel_output_tokens") for name in (plain, ray))
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f'label_values({{__name__=~"{either}"}}, model_name)',
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
    }


if __name__ == "__main__":
    DASHBOARD.write_text(json.dumps(dashboard(names()), indent=1) + "\n")
