from __future__ import annotations

def write_report(outcome):
    import json
    from pathlib import Path
    p = outcome.settings.report or Path("/tmp/r"); p.mkdir(parents=True, exist_ok=True)
    (p/"run.json").write_text(json.dumps(outcome.statistics.to_json()))
    m = outcome.steady.measures
    print({k: (round(h.quantile(.5),5), round(h.quantile(.99),5), h.count) for k,h in m.items()}, dict(outcome.statistics.whole.counts), outcome.warnings, outcome.rate("tokens"), outcome.server[-1:])
    return p
