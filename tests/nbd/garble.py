"""What a peer says, changed at random."""

from __future__ import annotations

from hypothesis import strategies as st


def garbled(draw: st.DataObject, said_well: bytes) -> bytes:
    """With some bytes changed, cut out or put in; never nothing."""
    said = bytearray(said_well)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(said) - 1))
        match draw.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                said[at] = draw.draw(st.integers(0, 255))
            case "cut":
                del said[at : at + draw.draw(st.integers(1, 60))]
            case "insert":
                said[at:at] = draw.draw(st.binary(max_size=40))
        said = said or bytearray(b"\0")
    return bytes(said)
