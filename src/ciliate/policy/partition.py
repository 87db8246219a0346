"""Partition refinement: which rules apply to whom, without looking at anybody."""

from collections.abc import Sequence

from ciliate.identity.selectors import Bitmap

Signature = tuple[int, ...]
"""Indexes of the bitmaps that have a position, ascending."""


def partition(bitmaps: Sequence[Bitmap]) -> dict[Signature, Bitmap]:
    """Return the positions that are in the same bitmaps, by these; positions in none are left out."""
    parts: dict[Signature, Bitmap] = {}
    covered = 0
    for index, bitmap in enumerate(bitmaps):
        rest = bitmap & covered
        if rest:
            for signature, part in list(parts.items()):
                both = part & rest
                if not both:
                    continue
                if both == part:
                    del parts[signature]
                else:
                    parts[signature] = part ^ both
                parts[*signature, index] = both
                rest ^= both
                if not rest:
                    break
        fresh = bitmap & ~covered
        if fresh:
            parts[(index,)] = fresh
            covered |= fresh
    return parts


def signature_at(bitmaps: Sequence[Bitmap], position: int) -> Signature:
    """Return which bitmaps have a position."""
    bit = 1 << position
    return tuple(index for index, bitmap in enumerate(bitmaps) if bitmap & bit)
