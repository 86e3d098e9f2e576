"""The roofline against published speeds, and where its fitted constants come from.

    python benchmarks/roofline_against_published.py

It prints what `merino-edge estimate --check` prints. Then it fits the constants again to the rows marked "fitted",
which needs scipy. It says how far off each model of llama.cpp and Ollama is when the others alone are fitted to. Last
it estimates merino-edge where llama.cpp has its best published figure, on an Orin Nano at 25 W.
"""

from __future__ import annotations

import dataclasses
import math
import statistics

from scipy.optimize import brentq, least_squares

from merino_edge.cli.estimate import estimate
from merino_edge.jetson.estimate.boards import board
from merino_edge.jetson.estimate.published_speeds import (
    SMOLHUB_LENGTH,
    SMOLLM2_135M,
    PublishedSpeed,
    rows,
    unfitted_errors_percent,
)
from merino_edge.jetson.estimate.roofline import Roofline, Runtime, runtime


def llama_cpp_like(base: Runtime, logs: list[float]) -> Runtime:
    """`base` with the three constants that are fitted; the factor of MAXN_SUPER is fitted after them."""
    macs, attention_macs, host_clocks = map(math.exp, logs)
    return dataclasses.replace(
        base, matrix_macs={"Q4_K_M": macs}, attention_macs=attention_macs, host_clocks=host_clocks
    )


def fit(base: Runtime, chosen: list[PublishedSpeed]) -> Runtime:
    def residuals(logs: list[float]) -> list[float]:
        return [math.log(row.predicted_tokens_per_s(llama_cpp_like(base, logs)) / row.tokens_per_s) for row in chosen]

    begun = [math.log(x) for x in (base.matrix_macs["Q4_K_M"], base.attention_macs, base.host_clocks)]
    return llama_cpp_like(base, list(least_squares(residuals, begun).x))


def mape_percent(base: Runtime, chosen: list[PublishedSpeed]) -> float:
    return statistics.fmean(abs(row.predicted_tokens_per_s(base) / row.tokens_per_s - 1) for row in chosen) * 100


def maxn_super_factor(base: Runtime, mine: list[PublishedSpeed]) -> float:
    """What the clock must be multiplied by for SmolLM2-135M to lose in MAXN_SUPER what it lost."""
    fast, slow = (
        next(row for row in mine if (row.model, row.power_mode) == ("SmolLM2-135M", mode))
        for mode in ("25W", "MAXN_SUPER")
    )

    def beyond(factor: float) -> float:
        slowed = dataclasses.replace(base, clock_factors={"MAXN_SUPER": factor})
        predicted = slow.predicted_tokens_per_s(slowed) / fast.predicted_tokens_per_s(slowed)
        return predicted - slow.tokens_per_s / fast.tokens_per_s

    return float(brentq(beyond, 0.5, 1.0))


def to_beat() -> str:
    """The estimate of SmolLM2-135M at int4 beside llama.cpp's published speed, with the same board, mode and length."""
    on, length = board("orin-nano-8gb"), SMOLHUB_LENGTH
    step_ms = Roofline(on, on.mode("25W"), runtime("merino-edge")).model_ms(SMOLLM2_135M, "decode", length, "int4")
    errors = unfitted_errors_percent("merino-edge", "decode")
    slowest, fastest = (1000 / (step_ms * (1 + error / 100)) for error in (errors[-1], errors[0]))
    [published] = [
        row.tokens_per_s
        for row in rows()
        if (row.framework, row.model, row.power_mode) == ("llama.cpp", "SmolLM2-135M", "25W")
    ]
    return (
        f"SmolLM2-135M, {on.name}, 25W, {length} positions: llama.cpp published {published:.1f} tokens/s; "
        f"merino-edge int4 estimated {1000 / step_ms:.0f} tokens/s ({slowest:.0f} to {fastest:.0f})"
    )


def main() -> None:
    estimate(check=True)
    print("\nfitted again (rounded in jetson/estimate/roofline.py)")
    for name in ("llama.cpp", "ollama"):
        mine, plain = [row for row in rows() if row.framework == name], runtime(name)
        unfactored = dataclasses.replace(plain, clock_factors={})
        fitted = fit(unfactored, [r for r in mine if r.fitted and r.power_mode != "MAXN_SUPER"])
        found = f"Q4_K_M {fitted.matrix_macs['Q4_K_M']:.2f} MACs, attention {fitted.attention_macs:.2f} MACs"
        print(f"{name}: {found} per SM and clock, host {fitted.host_clocks / 1e6:.2f} M clocks per step")
        if plain.clock_factors:
            print(f"  factor of the clock in MAXN_SUPER {maxn_super_factor(fitted, mine):.3f}, from SmolLM2-135M")
            others = [r for r in mine if r.power_mode == "MAXN_SUPER" and not r.fitted]
            without, with_it = mape_percent(unfactored, others), mape_percent(plain, others)
            print(f"  MAPE of the other models in MAXN_SUPER: {without:.1f}% without it, {with_it:.1f}% with it")
        for model in dict.fromkeys(row.model for row in mine):
            refitted = fit(unfactored, [r for r in mine if r.model != model and r.power_mode != "MAXN_SUPER"])
            left_out = [r for r in mine if r.model == model and (r.power_mode != "MAXN_SUPER" or name == "ollama")]
            print(f"  fitted to the others: MAPE {mape_percent(refitted, left_out):.1f}% on {model}")
    print(f"\n{to_beat()}")


if __name__ == "__main__":
    main()
