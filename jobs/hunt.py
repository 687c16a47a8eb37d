"""Which samples of a shard kill their worker: found by trying parts of it, halving those that kill.

Parts are tried from the front, each twice as large as the one before, so that the number of samples
need not be known; a part that kills is split until one sample is alone. With one poison sample
among n that takes about 2 log2(n) tries, which may run on several workers at once. Several poison
samples are found in one go. A death that does not happen again leaves nothing in `found`.

Pure: no Ray, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST = 16
"""Samples of the first part; a batch on a CPU."""

Span = tuple[int, int]


@dataclass(kw_only=True)
class Hunt:
    """`todo`: spans to try. `trying`: handed out. `found`: number of a sample and its reason."""

    todo: list[Span] = field(default_factory=lambda: [(0, FIRST)])
    trying: set[Span] = field(default_factory=set)
    found: dict[int, str] = field(default_factory=dict)
    frontier: int = FIRST
    ended: bool = False

    @property
    def over(self) -> bool:
        """Whether all of the shard has been tried."""
        return not self.todo and not self.trying

    def take(self) -> list[Span]:
        """The spans to try next."""
        spans, self.todo = self.todo, []
        self.trying.update(spans)
        return spans

    def survived(self, span: Span, tried: int) -> None:
        """The span, of which only `tried` samples exist, did no harm."""
        self.trying.remove(span)
        self.ended |= tried < span[1] - span[0]
        self._advance(span)

    def died(self, span: Span, reason: str) -> None:
        """The span killed its worker."""
        self.trying.remove(span)
        start, stop = span
        if stop - start == 1:
            self.found[start] = reason
        else:
            middle = (start + stop) // 2
            self.todo += [(start, middle), (middle, stop)]
        self._advance(span)

    def _advance(self, span: Span) -> None:
        start, stop = span
        if stop == self.frontier and not self.ended:
            self.frontier = stop + 2 * (stop - start)
            self.todo.append((stop, self.frontier))
