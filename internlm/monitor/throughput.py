"""Tokens per GPU and second (tgs), by several windows."""

from __future__ import annotations

from collections import deque

SMA_WINDOW = 100


class Throughput:
    """Follows the speed of a run; ``devices`` share the tokens of a step."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.tokens = 0
        self.seconds = 0.0
        self.steps = 0
        self._sum_of_rates = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=SMA_WINDOW)

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step that consumed ``tokens`` over all devices."""
        self.tokens += tokens
        self.seconds += seconds
        self.steps += 1
        self._sum_of_rates += self._rate(tokens, seconds)
        self._recent.append((tokens, seconds))

    def figures(self) -> dict[str, float]:
        """tgs of the last step, the last 10 and 50, the whole run; the mean over steps, and that over the last 100
        steps."""
        rates = [self._rate(*step) for step in self._recent]
        return {
            "tgs/last_tgs_1": rates[-1],
            "tgs/tgs_all": self._rate(self.tokens, self.seconds),
            "tgs/tgs_avg": self._sum_of_rates / self.steps,
            "tgs/tgs_SMA": sum(rates) / len(rates),
            "tgs/last_tgs_10": self._last(10),
            "tgs/last_tgs_50": self._last(50),
        }

    def _last(self, steps: int) -> float:
        window = list(self._recent)[-steps:]
        return self._rate(sum(tokens for tokens, _ in window), sum(seconds for _, seconds in window))

    def _rate(self, tokens: int, seconds: float) -> float:
        return tokens / self.devices / seconds
