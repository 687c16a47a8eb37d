"""Which samples of a shard kill their worker: found by trying parts of it, halving those that kill.

The first part is READ: every sample is read and none decoded. It tells how many there are, and
whether reading kills; then no part can be converted, for a sample lies behind those before it in
the file. After it the halves of the shard are tried; one that kills is split until one sample is
alone. With one poison sample among n that takes about 2 log2(n) tries, which may run on several
workers at once. Several poison samples are found in one go. A death that does not happen again
leaves nothing in `found`.

Pure: no Ray, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Span = tuple[int, int]

READ: Span = (0, 0)
"""The part that is the reading of all samples."""


@dataclass(kw_only=True)
class Bisection:
    """`todo`: spans to try. `trying`: handed out. `found`: number of a sample and its reason."""

    todo: list[Span] = field(default_factory=lambda: [READ])
    trying: set[Span] = field(default_factory=set)
    found: dict[int, str] = field(default_factory=dict)

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
        """The span, which has `tried` samples, did no harm."""
        self.trying.remove(span)
        if span == READ:
            self._split(0, tried)

    def died(self, span: Span, reason: str) -> None:
        """The span, which is not READ, killed its worker."""
        self.trying.remove(span)
        start, stop = span
        if stop - start == 1:
            self.found[start] = reason
        else:
            self._split(start, stop)

    def _split(self, start: int, stop: int) -> None:
        middle = (start + stop) // 2
        self.todo += [(a, b) for a, b in ((start, middle), (middle, stop)) if a < b]
