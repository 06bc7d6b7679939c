"""Ways in which values, texts and bytes are changed, each drawn from a random generator."""

import copy
import json
import struct

ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**63, -(2**63)),
    *(10**25, 10**400, 0.0, -0.0, 0.5, -0.5, 1e-300, 1e308, -1e308, 1.5, 1e-5),
    *(float("inf"), float("-inf"), float("nan")),
    *("", " ", "0", "x", "-1", "null", "\n", "a\nb", "\x1b[31mred", "\0", "é", "\u202e", "\ud800"),
    *("x" * 300, "x" * 100_000, "../../etc/passwd", "/dev/zero", "{phrase}", "<image>", "."),
    *((), [], {}, [0], [None], [[]], {"a": 1}, [1, 2], [1.0] * 3, ["a"] * 4, [[1, 2], [3, 4]]),
)
MAGIC = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def paths(value, here=()):
    """Every place in plain data, the leaves and what holds them."""
    yield here
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*here, key))
    elif isinstance(value, list):
        for k in range(len(value)):
            yield from paths(value[k], (*here, k))


def change_plain(data, rng, places=None):
    """Plain data with one place changed, and where."""
    data = copy.deepcopy(data)
    place = rng.choice(places or list(paths(data))[1:])
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    key, old = place[-1], holder[place[-1]]
    way = rng.randrange(10)
    if way == 0 and isinstance(holder, dict):
        del holder[key]
    elif way == 0:
        holder.pop(key)
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "\x1b[2J", "a\nb", f"{key} "))] = old
    elif way == 1:
        holder.insert(key, copy.deepcopy(old))
    else:
        holder[key] = change_value(old, rng)
    return data, ".".join(map(str, place))


def change_value(old, rng):
    """Another value: odd in any way, or near the old one."""
    if rng.random() < 0.5:
        return copy.deepcopy(rng.choice(ODD))
    if isinstance(old, bool) or old is None:
        return rng.choice((1, "true", not old, [old]))
    if isinstance(old, int | float):
        return rng.choice((-old, old + 1, old - 1, old * 2, old * 1000, float(old), str(old)))
    if isinstance(old, str):
        k = rng.randrange(len(old) + 1)
        return rng.choice((old[:k], old + old, old[k:] + old[:k], old.upper(), f"{old}\n", [old]))
    if isinstance(old, list):
        return rng.choice((old[1:], old[:-1], old + old, old[::-1], {str(k): k for k in range(2)}))
    return rng.choice(([old], list(old.values()), dict(list(old.items())[1:])))


def write_plain(data, rng):
    """JSON bytes of plain data, now and then damaged as a text."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    way = rng.randrange(12)
    if way == 0:
        return change_bytes(text, rng)
    if way == 1:
        deep = rng.choice((b"[", b'{"a":')) * rng.choice((100, 2000, 100_000))
        k = text.find(b":") + 1
        return text[:k] + deep + text[k:]
    return text


def change_bytes(data, rng, times=None):
    """Bytes with up to eight changes."""
    data = bytearray(data)
    for _ in range(times or rng.choice((1, 1, 1, 2, 4, 8))):
        way, size = rng.randrange(9), len(data)
        k = rng.randrange(size + 1) if rng.random() < 0.6 else min(rng.randrange(256), size)
        if way == 0:
            data = data[:k]
        elif way == 1:
            data[k : k + 1] = bytes([rng.randrange(256)])
        elif way == 2 and size:
            data[min(k, size - 1)] ^= 1 << rng.randrange(8)
        elif way == 3:
            data[k:k] = rng.randbytes(rng.choice((1, 4, 64)))
        elif way == 4:
            del data[k : k + rng.choice((1, 2, 4, 64, 4096))]
        elif way == 5:
            number, width = rng.choice(MAGIC), rng.choice("BHIQ")
            wide = struct.calcsize(width)
            raw = (number % 2 ** (8 * wide)).to_bytes(wide, rng.choice(("little", "big")))
            data[k : k + wide] = raw
        elif way == 6:
            j = rng.randrange(size + 1)
            data[k:k] = data[j : j + rng.choice((1, 8, 256))]
        elif way == 7:
            data[k : k + rng.choice((4, 64))] = bytes(rng.choice((4, 64)))
        elif rng.random() < 0.2:
            data = bytearray(rng.choice((b"", b"\0", b"{}", b"PK\x03\x04", bytes(64))))
    return bytes(data)


def change_text(text, rng):
    """A text with odd characters and pieces put in, or moved."""
    odd = (
        "\0",
        "\n",
        "\x1b[31m",
        "\u202e",
        "\ud800",
        "é",
        "\U0001d538",
        "<image>",
        "{phrase}",
        "</s>",
        "--",
        "\u0301" * 20,
        "﷽" * 50,
        "a" * 5000,
        " ",
        "<s>",
        "[0.1,",
        "0" * 400,
        "\u200b",
    )
    for _ in range(rng.choice((1, 1, 2, 5))):
        k = rng.randrange(len(text) + 1)
        way = rng.randrange(4)
        if way == 0:
            text = text[:k] + rng.choice(odd) + text[k:]
        elif way == 1:
            text = text[:k]
        elif way == 2:
            text = text[k:] + text[:k]
        else:
            text = rng.choice(odd) + text
    return text
