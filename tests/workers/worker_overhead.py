"""What the plugin calls, reads and exchanges in a step of each engine. Launched by test_overhead.py, one launch for all."""

from __future__ import annotations

from workers import ranks

from smartfrz_ds.bench.overhead.worker import counts_of, start

if __name__ == "__main__":
    with ranks.job() as (cases, folder):
        for engine, params in cases:
            with ranks.case(f"{engine}-{params}"):
                seen = counts_of(start(engine, params, str(folder)))
                result = {
                    kind: counts.numbers() | {"places": {**counts.calls, **counts.reads, **counts.collectives}}
                    for kind, counts in seen.items()
                }
                ranks.write(folder, f"{engine}-{params}", result)
