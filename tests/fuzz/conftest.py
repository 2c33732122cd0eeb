"""What the fuzzing of files shares: files as they should be, and mutations of their bytes by a seed.

``make fuzz`` tries thousands; the suite a few hundred, which are always the same.
"""

import os
import random

import pytest

CASES = int(os.environ.get("FUZZ_CASES", "40"))  # of each format
SEED = int(os.environ.get("FUZZ_SEED", "0"))
WORDS = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x00" * 8, b"\x80", b"{", b"[", b"-", b"9" * 20)


@pytest.fixture(params=range(CASES))
def mutate(request):
    """Returns a function that changes some bytes of a content, each case in its own way."""

    def change(content):
        chance = random.Random(f"{SEED} {request.param}")
        content = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            place = chance.randrange(len(content) + 1)
            match chance.randrange(5):
                case 0:
                    content[place : place + 1] = bytes([chance.randrange(256)])
                case 1:
                    word = chance.choice(WORDS)
                    content[place : place + len(word)] = word
                case 2:
                    del content[place : place + chance.choice((1, 2, 8, 100))]
                case 3:
                    start = chance.randrange(len(content) + 1)
                    content[place:place] = content[start : start + chance.choice((1, 4, 64))]
                case _:
                    if place < len(content):
                        content[place] ^= 1 << chance.randrange(8)
        return bytes(content)

    return change
