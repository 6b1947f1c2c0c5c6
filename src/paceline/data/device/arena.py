"""Arena: which part of one stretch of memory belongs to whom; numbers only, the memory is somebody else's."""

from __future__ import annotations

from bisect import bisect_left

ALIGNMENT = 64


class Arena:
    """Gives out parts of `num_bytes`, the lowest that is large enough first; all begin at multiples of 64 bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, num_bytes)] if num_bytes else []
        """First byte and length of each free part, ascending; no two of them touch."""

    @property
    def free_bytes(self) -> int:
        """Count what nobody has, in however many parts."""
        return sum(length for _, length in self._free)

    def take(self, num_bytes: int) -> int | None:
        """Return the first of so many bytes, which are the caller's from now on; None where no part is large enough."""
        wanted = rounded(num_bytes)
        for place, (start, length) in enumerate(self._free):
            if length >= wanted:
                if length == wanted:
                    del self._free[place]
                else:
                    self._free[place] = (start + wanted, length - wanted)
                return start
        return None

    def give(self, start: int, num_bytes: int) -> None:
        """Take back what `take` has given for `num_bytes`."""
        end = start + rounded(num_bytes)
        place = bisect_left(self._free, (start, 0))
        if place < len(self._free) and self._free[place][0] == end:
            end += self._free.pop(place)[1]
        if place > 0 and sum(self._free[place - 1]) == start:
            place -= 1
            start = self._free.pop(place)[0]
        self._free.insert(place, (start, end - start))


def rounded(num_bytes: int) -> int:
    """Count the bytes that are taken for so many: one alignment at least."""
    return max(-(-num_bytes // ALIGNMENT), 1) * ALIGNMENT
